"""Sensitivity of a language model: what does it cost to quantize one part alone, with all others in float?

The cost is the Kullback-Leibler divergence of the next token's distribution from the float model's, in nats a token, on
text that neither calibrates nor proves. Unlike the added loss it is never negative and does not depend on which token
came, so a few hundred tokens, the same for every part, tell parts apart.

Codes are chosen by GPTQ, each layer's from the float model's own inputs. A block's layers then do not depend on each
other: they are quantized together once for each number of bits, and put in place part by part. What comes before a
block is computed once; only the blocks behind it run again for each measurement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rlquant.llm.blocks import BlockStream, OneBlock
from rlquant.llm.model import LanguageModel, decoder_blocks
from rlquant.llm.parts import BITS, EMBEDDING, STEPS, TABLE_STEPS, Part, parts_of
from rlquant.llm.text import Windows, log_probabilities, total_divergence
from rlquant.llm.versions import at_precision
from rlquant.measure import Sensitivity
from rlquant.quant import Scheme, quantizable, quantize_, weight_bytes
from rlquant.runs import RunFolder

__all__ = ["PartSensitivity", "language_sensitivities", "other_bytes"]

_TOKENS = 512  # that are compared at least, in whole windows
_CALIBRATION_TOKENS = 2048  # that GPTQ reads at least, in whole windows; the trials read all there are
_TOKENS_PER_INPUT = 2  # and for each input of the widest layer, whose Hessian they have to determine
_METHOD = "gptq"
_FLOAT = Scheme.parse("fp32")  # which leaves a layer as it is


@dataclass(frozen=True)
class PartSensitivity(Sensitivity):
    """The cost of one part under one scheme, and the ``bytes`` that it then takes."""

    scheme: str
    bytes: int


def language_sensitivities(
    lm: LanguageModel,
    windows: Windows,
    calibration: Tensor,
    *,
    folder: RunFolder,
    bits: Sequence[int] = BITS,
    progress: Callable[[str], None] = lambda _sentence: None,
) -> list[PartSensitivity]:
    """Sensitivity of the embedding and of every part of every block, at each number of bits.

    Args:
        lm: the float model; unchanged afterwards.
        windows: the first few of them are read.
        calibration: int64 ``[windows, length]``; the first few of them too.
        folder: keeps what was measured.
        bits: of the blocks' parts, keys of ``STEPS``.
        progress: called with a sentence for each block.
    """
    length = windows.tokens.shape[1]
    scored = torch.from_numpy(windows.first(-(-_TOKENS // length)).tokens)
    enough = max(_CALIBRATION_TOKENS, _TOKENS_PER_INPUT * _widest(lm))
    read = calibration[: -(-enough // calibration.shape[1])]
    judge = _Judge(lm, scored)
    found = _kept(folder, EMBEDDING, lambda: _of_tables(lm, judge))
    streams = [BlockStream(lm, tokens, device=lm.device) for tokens in (scored, read)]
    parts = parts_of(lm.model)
    # Both streams carry the same blocks; the second one's know the shapes of calibration.
    for (index, _), (_, one) in zip(*(stream.blocks() for stream in streams), strict=True):
        progress(f"measuring the sensitivity of block {index} of {parts[-1].block + 1}")
        own = [part for part in parts if part.block == index]
        for count in bits:
            measure = partial(_of_block, one, own, streams, judge, count)
            found += _kept(folder, f"layers-{index}-int{count}", measure)
    return found


def _widest(lm: LanguageModel) -> int:
    """Inputs of the widest layer in a block."""
    blocks = decoder_blocks(lm.model)
    return max(
        layer.get_parameter("weight").shape[1] for block in blocks for layer in quantizable(block).values()
    )


def _kept(
    folder: RunFolder, name: str, measure: Callable[[], list[PartSensitivity]]
) -> list[PartSensitivity]:
    """What an interrupted run measured, or what is measured now."""
    kept = folder.piece(f"sensitivity-{name}")
    if kept is not None:
        return [PartSensitivity(**each) for each in kept["parts"]]
    found = measure()
    folder.save_piece(f"sensitivity-{name}", {"parts": [asdict(each) for each in found]})
    return found


def _of_tables(lm: LanguageModel, judge: _Judge) -> list[PartSensitivity]:
    found = []
    rest = other_bytes(lm)
    for bits, scheme in TABLE_STEPS.items():
        quantized = at_precision(lm, f"{_FLOAT.name}+{EMBEDDING}={scheme}")
        with torch.no_grad():
            last = [
                quantized.model.get_decoder()(ids, use_cache=False).last_hidden_state for ids in judge.batches
            ]
        cost = judge.divergence(last, quantized)
        size = weight_bytes(quantized.model) - rest
        found.append(PartSensitivity(EMBEDDING, "table", "weights", bits, cost, None, scheme, size))
    return found


def other_bytes(lm: LanguageModel) -> int:
    """Bytes of everything but the embedding and the output layer."""
    tables = nn.ModuleList([lm.model.get_input_embeddings()])
    head = lm.model.get_output_embeddings()
    if head is not None:
        tables.append(head)
    return weight_bytes(lm.model) - weight_bytes(tables)


def _of_block(
    one: OneBlock, parts: list[Part], streams: list[BlockStream], judge: _Judge, bits: int
) -> list[PartSensitivity]:
    (scored, read), scheme = streams, STEPS[bits]
    found = []
    quantized = quantize_(
        copy.deepcopy(one), scheme, method=_METHOD, calibration=read.hidden, sequential=False
    )
    for part in parts:
        layers = {name: quantized.get_submodule(f"block.{name}") for name in part.names}
        size = weight_bytes(nn.ModuleList(layers.values()))
        with _in_place(one.block, layers):
            cost = judge.divergence(scored.onward(part.block))
        found.append(PartSensitivity(part.name, part.kind, "weights", bits, cost, None, scheme, size))
    return found


@contextmanager
def _in_place(block: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Other layers in a block for a while."""
    floats = {name: block.get_submodule(name) for name in layers}
    for name, layer in layers.items():
        block.set_submodule(name, layer)
    try:
        yield
    finally:
        for name, layer in floats.items():
            block.set_submodule(name, layer)


class _Judge:
    """How far distributions are from the float model's on the same tokens."""

    def __init__(self, lm: LanguageModel, tokens: Tensor) -> None:
        self.lm = lm
        self.batches = [ids.to(lm.device) for ids in torch.split(tokens, 4)]  # as BlockStream splits them
        with torch.no_grad():
            last = [lm.model.get_decoder()(ids, use_cache=False).last_hidden_state for ids in self.batches]
        self.reference = [[log_probabilities(lm, window) for window in batch] for batch in last]

    def divergence(self, hidden: list[Tensor], lm: LanguageModel | None = None) -> float:
        """Mean Kullback-Leibler divergence from the float model, nats a token.

        Args:
            hidden: last hidden states ``[batch, length, hidden]`` of each batch.
            lm: whose output layer they go through; by default the float model's.
        """
        total, count = 0.0, 0
        for batch, references in zip(hidden, self.reference, strict=True):
            for window, p in zip(batch, references, strict=True):
                q = log_probabilities(lm or self.lm, window)
                total += total_divergence(p, q)
                count += len(p)
        return max(0.0, total / count)
