"""Observers: choose the qparams of a weight that is at hand, or of activations that stream past.

A weight is given whole. Activations come batch by batch and are too many to keep, so an :class:`Observer`
keeps the two extremes, exactly, and a uniform random sample of bounded size, from a seeded generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.quant.affine import QParams, finite_extremes, qparams_from_range
from rlquant.quant.formats import Format
from rlquant.quant.granularity import CACHED_ELEMENTS, Granularity, as_matrix, row_chunks
from rlquant.quant.ranges import Range, RangeRule, get_observer, mse

__all__ = ["Observer", "Reservoir", "weight_qparams", "weight_ranges"]

SAMPLE_SIZE = 2**16


class Reservoir:
    """A uniform random sample, without replacement, of a stream of items ``[n, ...]``.

    Every item draws a random key and the ``size`` largest keys stay, so that the sample depends on the seed
    and the order of the stream and on nothing else.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.items = torch.empty(0)
        self._keys = torch.empty(0)
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, items: Tensor) -> None:
        """Take in items ``[n, ...]`` of any float dtype; they are kept as float32 on their device."""
        keys = torch.rand(len(items), generator=self._generator)
        if self._keys.numel() == self.size:
            chosen = keys > self._keys.min()
            items, keys = items[chosen.to(items.device)], keys[chosen]
        first = self._keys.numel() == 0
        items = items.to(torch.float32) if first else torch.cat([self.items, items.to(torch.float32)])
        keys = torch.cat([self._keys, keys])
        kept = keys.topk(min(self.size, keys.numel())).indices
        self.items, self._keys = items[kept.to(items.device)], keys[kept]


class Observer:
    """Chooses one range for a stream of activation batches of any shape.

    The result depends on the seed and on the order of the batches, nothing else.
    """

    def __init__(
        self, fmt: Format, observer: str = "minmax", *, sample_size: int = SAMPLE_SIZE, seed: int = 0
    ) -> None:
        self.fmt = fmt
        self.rule = get_observer(observer)
        self.sample_size = (
            0 if observer == "minmax" else sample_size
        )  # the extremes are all that minmax reads
        self.count = 0
        self._extremes = torch.empty(0)
        self._sample = Reservoir(self.sample_size, seed)

    def observe(self, x: Tensor, what: str = "the observed tensor") -> None:
        """Take in a batch: float, any shape. Raises InputError naming ``what`` for NaN or Inf."""
        if x.numel() == 0:
            return
        extremes = torch.cat([self._extremes, finite_extremes(x, what).cpu()])
        self._extremes = torch.stack(torch.aminmax(extremes))
        self.count += x.numel()
        if self.sample_size:
            self._sample.add(x.detach().reshape(-1).to("cpu", torch.float32))

    def qparams(self) -> QParams:
        """Scalar qparams (shape ``[]``) of what was seen. Raises InputError where that is nothing."""
        if self.count == 0:
            raise InputError("nothing was observed, so no range can be chosen: run calibration data first")
        values = self._sample.items
        if self.count > self.sample_size:
            # With the extremes beside the sample, a rule sees the true range whatever the sample missed.
            values = torch.cat([values, self._extremes])
        low, high = self.rule(values[None], self.fmt)
        return qparams_from_range(low[0], high[0], self.fmt)


def weight_qparams(
    weight: Tensor,
    fmt: Format,
    granularity: Granularity,
    observer: str = "minmax",
    what: str = "the weight",
) -> QParams:
    """Qparams of a weight ``[out, ...]``; scale and zero point have ``granularity.scale_shape``.

    Raises InputError naming ``what`` for NaN or Inf. Under ``mse`` a group may also take the range of its
    channel, so the squared error of a channel never grows when it is split into groups.
    """
    finite_extremes(weight, what)
    matrix = as_matrix(weight.detach()).to(torch.float32)
    return qparams_from_range(*weight_ranges(matrix, fmt, granularity, observer), fmt)


def weight_ranges(matrix: Tensor, fmt: Format, granularity: Granularity, observer: str = "minmax") -> Range:
    """Lows and highs of a float32 ``[rows, columns]`` weight, each of ``granularity.scale_shape``."""
    rule = get_observer(observer)
    channel = _ranges(matrix, fmt, rule) if granularity.kind == "group" and rule is mse else None
    parts = []
    for blocks in granularity.blocks(matrix):
        offered = None
        if channel is not None:
            per_row = len(blocks) // len(matrix)
            offered = (channel[0].repeat_interleave(per_row), channel[1].repeat_interleave(per_row))
        low, high = _ranges(blocks, fmt, rule, offered)
        rows = 1 if granularity.kind == "tensor" else len(matrix)
        parts.append((low.view(rows, -1), high.view(rows, -1)))
    lows, highs = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    return lows, highs


def _ranges(blocks: Tensor, fmt: Format, rule: RangeRule, offered: Range | None = None) -> Range:
    """The rule over chunks of rows, so that its temporaries stay small."""
    parts = []
    for rows in row_chunks(len(blocks), blocks.shape[1], CACHED_ELEMENTS):
        if offered is None:
            parts.append(rule(blocks[rows], fmt))
        else:
            parts.append(mse(blocks[rows], fmt, offered=(offered[0][rows], offered[1][rows])))
    lows, highs = zip(*parts, strict=True)
    return torch.cat(lows), torch.cat(highs)
