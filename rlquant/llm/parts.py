"""The parts of a language model that a search gives bits of their own, and plans that say so briefly.

A part of a block is what runtimes fuse into one matrix product, or nearly so, and what therefore has to have one scheme
there (vLLM refuses query, key and value projections of different schemes): attention's projections together, the MLP's
that read the hidden state together, and ``down_proj``, which reads the widest and wildest activations, alone. Three
parts a block keep the number of measurements near a hundred times the bits to try. The embedding is a part, with the
output layer whether tied or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from rlquant.llm.model import decoder_blocks
from rlquant.llm.quantize import Plan
from rlquant.quant import Scheme, quantizable

__all__ = ["BITS", "EMBEDDING", "STEPS", "TABLE_STEPS", "Part", "parts_of", "plan_of"]

STEPS = {
    8: "int8",
    6: "int6-g128",
    5: "int5-g128",
    4: "int4-g128",
    3: "int3-g128-asym",
    2: "int2-g64-asym",
}
"""Schemes of linear layers by bits. Below 4 bits a grid that is symmetric about zero wastes too much: with a zero
point GPTQ's squared error at the output of SmolLM2's blocks is a quarter lower at 3 bits, a third to a half at 2."""
BITS = tuple(STEPS)
"""Bits that are tried where none are named. Without 6 and 5 the ladder has a hole where small models need it: SmolLM2
of 135M parameters keeps 99% in 93 MB at 5 bits throughout; the mixture of 8 and 4 that a search proved takes 109 MB."""
TABLE_STEPS = {8: "int8", 6: "int6-g64", 4: "nf4-dq", 3: "int3-g64-asym"}
"""Schemes of the embedding, which is rounded to nearest; NF4 with its scales in 8 bits is less than ``int4-g128``."""
EMBEDDING = "embedding"
_APART = "down_proj"


@dataclass(frozen=True)
class Part:
    """Linear layers of one block.

    Attributes:
        block: its index.
        names: of the layers within the block, such as ``mlp.down_proj``.
        kind: ``self_attn``, ``mlp``, ``mlp.down_proj``: what it is called in every block.
        whole: whether ``kind.*`` names these layers and no others.
    """

    block: int
    names: tuple[str, ...]
    kind: str
    whole: bool

    @property
    def name(self) -> str:
        """In the whole model."""
        return f"layers.{self.block}.{self.kind}"

    def patterns(self, block: str) -> list[str]:
        """Patterns of a plan that name its layers in a block, or in every one where ``block`` is ``*``."""
        inside = [f"{self.kind}.*"] if self.whole else self.names
        return [f"layers.{block}.{name}" for name in inside]


def parts_of(model: Any) -> list[Part]:
    """The parts of all blocks, from the first to the last. Raises InputError as ``decoder_blocks``."""
    blocks = enumerate(decoder_blocks(model))
    return list(chain.from_iterable(_parts(index, block) for index, block in blocks))


def _parts(index: int, block: nn.Module) -> Iterable[Part]:
    named: dict[str, list[str]] = {}
    for name in quantizable(block):
        parent, _, leaf = name.rpartition(".")
        named.setdefault(name if leaf == _APART or not parent else parent, []).append(name)
    for kind, names in named.items():
        below = [name for name in quantizable(block) if name.startswith(f"{kind}.")]
        yield Part(index, tuple(names), kind, below == names)


def plan_of(chosen: Mapping[Part, str], embedding: str, method: str) -> Plan:
    """The plan whose name is short: a scheme for most, one for all parts of a kind where most of them have it, then the
    exceptions.

    Args:
        chosen: the scheme of every part of the model.
        embedding: that of the embedding.
        method: of the plan.
    """
    base = _most(chosen.values())
    kinds = {part.kind: part for part in chosen}
    usual = {
        kind: _most((name for part, name in chosen.items() if part.kind == kind), base) for kind in kinds
    }
    blocks: dict[int, list[Part]] = {}
    for part in chosen:
        blocks.setdefault(part.block, []).append(part)
    if len({tuple((part.kind, part.names) for part in parts) for parts in blocks.values()}) > 1:
        usual = dict.fromkeys(kinds, base)  # a pattern for all blocks has to match in each of them
    named: dict[str, str] = {}
    for kind, scheme in usual.items():
        if scheme != base:
            named |= dict.fromkeys(kinds[kind].patterns("*"), scheme)
    for index, parts in blocks.items():
        odd = [part for part in parts if chosen[part] != usual[part.kind]]
        if len(odd) == len(parts) > 1 and len({chosen[part] for part in odd}) == 1:
            named[f"layers.{index}.*"] = chosen[odd[0]]
            continue
        for part in odd:
            named |= dict.fromkeys(part.patterns(str(index)), chosen[part])
    schemes = {pattern: Scheme.parse(name) for pattern, name in named.items()}
    return Plan(Scheme.parse(base), method, Scheme.parse(embedding), schemes)


def _most(names: Iterable[str], rather: str = "") -> str:
    """The commonest; of several ``rather``, or the first by name, so that the same choice has one name."""
    count = Counter(names)
    return min(count, key=lambda name: (-count[name], name != rather, name))
