"""From a float language model to a quantized one, block by block, by the methods of ``rlquant.quant``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.blocks import BlockStream, OneBlock, blocks_in_turn
from rlquant.llm.model import LanguageModel, block_links, decoder_blocks, decoder_of
from rlquant.quant import (
    Link,
    QuantEmbedding,
    QuantizedWeight,
    QuantLinear,
    Scheme,
    device_of,
    get_method,
    prepare_empty_,
    quantize_,
)

__all__ = ["BlockStore", "Plan", "apply_embedding_", "prepare_", "quantize_model_"]


@dataclass(frozen=True)
class Plan:
    """What becomes of a language model.

    Attributes:
        scheme: of the linear layers in the blocks.
        method: how codes are chosen; see ``rlquant.quant.METHODS``.
        embedding: scheme of the embedding and of the output layer, whether tied or not; ``fp32`` leaves both as
            they are.
        schemes: schemes of single layers or whole blocks, by names or patterns such as ``layers.0.*`` or
            ``layers.*.mlp.down_proj``; of several that match, the last counts.
    """

    scheme: Scheme
    method: str = "rtn"
    embedding: Scheme = field(default_factory=lambda: Scheme.parse("fp32"))
    schemes: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The scheme's name, and the embedding's behind ``+embedding=``."""
        parts = [self.scheme.name, *(f"{name}={each.name}" for name, each in self.schemes.items())]
        if not self.embedding.is_identity:
            parts.append(f"embedding={self.embedding.name}")
        return "+".join(parts)

    @classmethod
    def parse(cls, name: str, method: str = "rtn") -> Plan:
        """Of a name such as ``int4-g128`` or ``nf4+embedding=int8+layers.0.*=int8``. Raises InputError."""
        head, *rest = name.split("+")
        named: dict[str, Scheme] = {}
        for part in rest:
            layer, equals, scheme = part.partition("=")
            if not equals:
                raise InputError(
                    f"{part!r} in {name!r} names no scheme: write embedding=int8 or layers.0.*=int8"
                )
            named[layer] = Scheme.parse(scheme)
        embedding = named.pop("embedding", Scheme.parse("fp32"))
        return cls(Scheme.parse(head), method, embedding, named)

    @property
    def needs_calibration(self) -> bool:
        """Whether text has to be read first."""
        schemes = (self.scheme, *self.schemes.values())
        return get_method(self.method).needs_calibration or any(each.needs_calibration for each in schemes)

    def check(self, blocks: int) -> None:
        """Raises InputError for a scheme of a block that a model of so many blocks lacks."""
        for pattern in self.schemes:
            number = pattern.split(".")[1] if pattern.startswith("layers.") else ""
            if not (number == "*" or (number.isdigit() and int(number) < blocks)):
                raise InputError(
                    f"{pattern!r} names no layer: layers.* or layers.0 to layers.{blocks - 1}, and what is in it, "
                    "such as layers.0.mlp.down_proj"
                )

    def of_block(self, index: int) -> dict[str, Scheme]:
        """Schemes of single layers of one block, by names within :class:`~rlquant.llm.blocks.OneBlock`."""
        prefix, found = f"layers.{index}", {}
        for pattern, scheme in self.schemes.items():
            number, _, inside = pattern.removeprefix("layers.").partition(".")
            if number in ("*", prefix.partition(".")[2]):
                found[f"block.{inside}" if inside and inside != "*" else "block.*"] = scheme
        return found


class BlockStore(Protocol):
    """Where finished blocks are kept, so that an interrupted run goes on; ``rlquant.runs.RunFolder`` is one."""

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """What was kept under a name."""

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors."""


def quantize_model_(
    lm: LanguageModel,
    plan: Plan,
    *,
    calibration: Tensor | None = None,
    device: str | torch.device | None = None,
    batch: int = 4,
    store: BlockStore | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> LanguageModel:
    """Quantize a language model in place and return it with its new precision.

    Each block sees its inputs as the blocks quantized before it make them. Only one block, and the windows on
    their way, are on ``device`` at a time; and where ``lm`` has unread weights, one block's are in memory.

    Args:
        lm: the model, on any device; it may have unread weights.
        plan: what becomes of it.
        calibration: int64 ``[windows, length]``, for plans that need it.
        device: where blocks are quantized; by default where the model is.
        batch: windows that go through a block together.
        store: keeps every finished block.
        progress: called with blocks done and all.

    Raises:
        InputError: a scheme, method or layer is unknown, calibration is missing, or the model's layout is.
    """
    if plan.needs_calibration and calibration is None:
        raise InputError(
            f"{plan.method} at {plan.scheme.name} needs calibration: give it text or preference data"
        )
    count = len(decoder_blocks(lm.model))
    plan.check(count)
    for index, turn in _blocks(lm, plan, calibration, device or lm.device, batch):
        kept = store.tensors(f"block-{index}") if store is not None else None
        if kept is None:
            _quantize_block(turn, plan, index, calibration)
            if store is not None:
                store.save_tensors(f"block-{index}", turn.one.block.state_dict())
        else:
            _restore_block(turn.one, plan, index, kept)
        progress(index + 1, count)
    lm.read_(lm.model)
    apply_embedding_(lm.model, plan.embedding)
    keep_packed_(lm.model)
    return lm.but(precision=plan.name, method=plan.method, unread=None)


def prepare_(model: Any, plan: Plan) -> None:
    """Swap in empty quantized layers, for ``load_state_dict`` to restore a quantized model."""
    for index, block in enumerate(decoder_blocks(model)):
        one = OneBlock(block, {})
        prepare_empty_(one, plan.scheme, schemes=plan.of_block(index))
    apply_embedding_(model, plan.embedding, empty=True)
    keep_packed_(model)


def keep_packed_(model: nn.Module) -> None:
    """No layer keeps its dense weight."""
    for part in model.modules():
        if isinstance(part, QuantizedWeight):
            part.caches = False


def apply_embedding_(model: Any, scheme: Scheme, *, empty: bool = False) -> None:
    """Quantize the embedding and the output layer, in place; those that are tied stay tied.

    ``empty`` makes layers without weights.
    """
    if scheme.is_identity:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding:
        raise InputError(
            f"the embedding is a {type(embedding).__name__}, which does more than look up rows, so it cannot be "
            "quantized: leave out '+embedding=…'"
        )
    tied = head is not None and head.weight is embedding.weight
    table = QuantEmbedding(embedding, scheme).to(embedding.weight.device)
    if not empty:
        table.load_float(embedding)
    decoder_of(model).embed_tokens = table
    if head is None:
        return
    output = QuantLinear(head, scheme).to(head.weight.device)
    if tied:
        output.packed = table.packed
    elif not empty:
        output.load_float(head)
    model.lm_head = output


@dataclass
class _Turn:
    """One block, and what enters it."""

    one: OneBlock
    hidden: list[Tensor]


def _blocks(
    lm: LanguageModel, plan: Plan, tokens: Tensor | None, device: Any, batch: int
) -> Iterator[tuple[int, _Turn]]:
    if plan.needs_calibration:
        assert tokens is not None
        stream = BlockStream(lm, tokens, device=device, batch=batch)
        for index, one in stream.blocks():
            yield index, _Turn(one, stream.hidden)
        return
    for index, one in blocks_in_turn(lm, device):
        yield index, _Turn(one, [])


def _quantize_block(turn: _Turn, plan: Plan, index: int, calibration: Tensor | None) -> None:
    links = [
        Link(f"block.{link.producer}", tuple(f"block.{name}" for name in link.consumers))
        for link in block_links(turn.one.block)
    ]
    try:
        quantize_(
            turn.one,
            plan.scheme,
            method=plan.method,
            calibration=turn.hidden or None,
            schemes=plan.of_block(index),
            links=links,
        )
    except InputError as error:
        raise InputError(f"block {index}: {error}") from None
    keep_packed_(turn.one)


def _restore_block(one: OneBlock, plan: Plan, index: int, tensors: dict[str, Tensor]) -> None:
    device = device_of(one.block)
    prepare_empty_(one, plan.scheme, schemes=plan.of_block(index))
    one.block.load_state_dict(tensors)
    one.block.to(device)
    keep_packed_(one)
