"""Prompts are read by the model's own layers, in CUDA graphs for shapes that come again.

On a small model what such a pass costs is launches: reading a few prompts took as long as 30 steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlquant.llm.decode.cache import StaticCache
from rlquant.llm.decode.graphs import Graph
from rlquant.llm.decoding import Decoder

__all__ = ["Prefill"]

_GRANULE = 64
"""Tokens to a multiple of which prompts in graphs are filled up."""
_CAPTURED, _EAGER = 2048, 8192
"""Tokens of prompts that are read together, padding included, which bounds the memory of their activations."""
_GRAPHS = 16


@dataclass(frozen=True)
class _Inputs:
    """``ids``: int64 ``[prompts, tokens]``; ``slots``, ``ends``: int64 ``[prompts]``, the places of the last tokens."""

    ids: Tensor
    slots: Tensor
    ends: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], slots: Sequence[int], length: int) -> _Inputs:
        """On the CPU; prompts are filled up with zeros."""
        ids = torch.tensor([[*each, *[0] * (length - len(each))] for each in texts])
        return cls(ids, torch.tensor(slots), torch.tensor([len(each) - 1 for each in texts]))

    def to(self, device: torch.device) -> _Inputs:
        """There."""
        return _Inputs(self.ids.to(device), self.slots.to(device), self.ends.to(device))

    def copy_(self, other: _Inputs) -> None:
        """Become another of the same shape."""
        self.ids.copy_(other.ids)
        self.slots.copy_(other.slots)
        self.ends.copy_(other.ends)


class Prefill:
    """Reads prompts into a cache.

    Args:
        decoder: whose layers read.
        cache: is written to.
        captured: whether there are graphs.
        pool: see :class:`~rlquant.llm.decode.graphs.Graph`.
    """

    def __init__(self, decoder: Decoder, cache: StaticCache, *, captured: bool, pool: object = None) -> None:
        self.decoder, self.cache, self.captured, self.pool = decoder, cache, captured, pool
        self.graphs: dict[torch.Size, tuple[Graph, _Inputs]] = {}
        self._seen: Counter[torch.Size] = Counter()

    def parts(self, texts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Prompts that are read together."""
        part: list[tuple[int, ...]] = []
        for text in texts:
            if part and self._padded([*part, text]) * (len(part) + 1) > self._most:
                yield part
                part = []
            part.append(text)
        yield part

    @torch.no_grad()
    def __call__(self, texts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Logits after prompts, float32 ``[prompts, vocabulary]``, in memory that the next call may write to.

        Args:
            texts: prompts.
            slots: where in the cache their tokens go.
        """
        device = self.cache.keys.device
        given = _Inputs.of(texts, slots, self._padded(texts))
        shape = given.ids.shape
        self._seen[shape] += 1
        if shape not in self.graphs and self._comes_again(shape):
            self._capture(given.to(device))
        if shape not in self.graphs:
            return self._read(given.to(device))
        graph, inputs = self.graphs[shape]
        inputs.copy_(given)
        return graph()

    @property
    def _most(self) -> int:
        return _CAPTURED if self.captured else _EAGER

    def _padded(self, texts: Sequence[Sequence[int]]) -> int:
        longest = max(map(len, texts))
        return min(-(-longest // _GRANULE) * _GRANULE, self.cache.length) if self.captured else longest

    def _comes_again(self, shape: torch.Size) -> bool:
        again = self._seen[shape] > 1 and len(self.graphs) < _GRAPHS
        return self.captured and again and shape.numel() <= _CAPTURED

    def _capture(self, inputs: _Inputs) -> None:
        with torch.cuda.device(self.cache.keys.device):
            try:
                self.graphs[inputs.ids.shape] = Graph(lambda: self._read(inputs), pool=self.pool), inputs
            except RuntimeError:  # a layer waits for the GPU: prompts are read without graphs from now on
                self.captured = False

    def _read(self, inputs: _Inputs) -> Tensor:
        ids = inputs.ids
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self.decoder.hidden(ids, positions, self.cache, inputs.slots, ids.shape[1])
        return self.decoder.logits(hidden[torch.arange(len(ids), device=ids.device), inputs.ends])
