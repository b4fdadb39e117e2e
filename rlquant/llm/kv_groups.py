"""Quantized groups of keys and values: packed codes with a 16-bit scale, and an offset for integers.

An integer group stores unsigned codes of ``(x - offset) / scale``, where the offset is the group's smallest
value: a channel that stays far from zero spends no code on the way to zero. An fp8 group stores e4m3 codes of
``x / scale``. Scales and offsets have the model's dtype (float16 for a float32 model) and are rounded
outwards, so that a group's grid covers all its values and the error of an integer code is at most half a step.
Source: KIVI (Liu et al. 2024, arXiv:2402.02750), whose group stores the same codes, scale and smallest value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.quant.affine import QParams, dequantize, qparams_from_range, quantize
from rlquant.quant.formats import Format
from rlquant.quant.granularity import row_chunks
from rlquant.quant.packing import pack, unpack

__all__ = ["Groups", "PackedStates", "Regroup", "per_channel", "per_token"]

Regroup = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Groups:
    """Quantized groups in rows; a row is a group of tokens for keys and one token for values.

    ``codes``: uint8 ``[batch, heads, rows, groups, group_size * bits / 8]``; ``scale`` and ``offset``: 16-bit
    floats ``[batch, heads, rows, groups, 1]``, no offset for fp8.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Groups:
        """The groups whose tensors are ``change`` of these."""
        offset = None if self.offset is None else change(self.offset)
        return Groups(change(self.codes), change(self.scale), offset)

    def rows(self, rows: slice) -> Groups:
        """A view of some rows."""
        return self.map(lambda tensor: tensor[:, :, rows])

    def tensors(self) -> list[Tensor]:
        """Codes, scale and, where there is one, offset."""
        return [self.codes, self.scale] + ([] if self.offset is None else [self.offset])


def _quantize_groups(x: Tensor, fmt: Format, what: str) -> Groups:
    """Groups along the last dimension of ``x``, ``[batch, heads, rows, groups, group_size]``."""
    short = x.dtype if x.dtype.itemsize == 2 else torch.float16
    x = x.detach().to(torch.float32)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    offset = None if fmt.signed else -_rounded_up(-low, short)
    if offset is not None:
        x, low, high = x - offset, low - offset, high - offset
    scale = _rounded_up(qparams_from_range(low, high, fmt).scale, short)
    if not all(bool(part.isfinite().all()) for part in (scale, offset) if part is not None):
        raise InputError(
            f"{what} hold NaN, Inf or numbers beyond the {torch.finfo(short).max:g} of a {short} scale: "
            f"the KV cache of this model cannot be quantized; try the model in bfloat16"
        )
    codes = pack(quantize(x, QParams(scale.to(torch.float32)), fmt), fmt.bits)
    return Groups(codes.view(*x.shape[:-1], -1), scale, offset)


def _dequantize_groups(groups: Groups, fmt: Format, group_size: int) -> Tensor:
    """The values, float32 ``[batch, heads, rows, groups, group_size]``."""
    shape = (*groups.scale.shape[:-1], group_size)
    codes = unpack(groups.codes.reshape(-1), fmt.bits, math.prod(shape)).view(shape)
    x = dequantize(codes, QParams(groups.scale.to(torch.float32)), fmt)
    return x if groups.offset is None else x.add_(groups.offset)


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of a 16-bit ``dtype``, or the next one up where the nearest is below ``x``."""
    limits = torch.finfo(dtype)
    nearest = x.to(dtype)
    # A little over half a unit in the last place sends x past the middle, where rounding goes up.
    above = (x + (x.abs() + limits.smallest_normal) * (0.502 * limits.eps)).to(dtype)
    return torch.where(nearest < x, above, nearest)


def per_channel(keys: Tensor, group_size: int) -> Tensor:
    """``[batch, heads, tokens, channels]`` -> a view ``[batch, heads, token groups, channels, group_size]``."""
    batch, heads, _, channels = keys.shape
    return keys.view(batch, heads, -1, group_size, channels).transpose(3, 4)


def per_token(values: Tensor, group_size: int) -> Tensor:
    """``[batch, heads, tokens, channels]`` -> a view ``[batch, heads, tokens, channel groups, group_size]``."""
    return values.view(*values.shape[:3], -1, group_size)


class PackedStates:
    """The tokens of one layer's keys (or values) that have left the window."""

    def __init__(self, fmt: Format, group_size: int, regroup: Regroup, what: str) -> None:
        self.fmt, self.group_size, self.regroup, self.what = fmt, group_size, regroup, what
        self.tokens = 0
        self.groups: Groups | None = None

    def append(self, x: Tensor) -> None:
        """Quantize ``[batch, heads, tokens, channels]``, a whole number of token groups, after what is held."""
        view = self.regroup(x, self.group_size)
        chunks = row_chunks(view.shape[2], view[:, :, 0].numel())
        parts = [_quantize_groups(view[:, :, rows], self.fmt, self.what) for rows in chunks]
        held = [] if self.groups is None else [self.groups]
        columns = zip(*(part.tensors() for part in held + parts), strict=True)
        self.groups = Groups(*(torch.cat(column, dim=2) for column in columns))
        self.tokens += x.shape[2]

    def read_into(self, x: Tensor) -> None:
        """Write the values held to the first ``self.tokens`` tokens of ``[batch, heads, tokens, channels]``."""
        if self.groups is None:
            return
        view = self.regroup(x[:, :, : self.tokens], self.group_size)
        for rows in row_chunks(view.shape[2], view[:, :, 0].numel()):
            view[:, :, rows] = _dequantize_groups(self.groups.rows(rows), self.fmt, self.group_size)

    def truncate(self, tokens: int) -> None:
        """Keep the first ``tokens`` tokens, a whole number of token groups."""
        if self.groups is None or tokens == self.tokens:
            return
        rows = self.groups.scale.shape[2] * tokens // self.tokens
        self.groups = self.groups.rows(slice(rows)).map(torch.clone) if rows else None
        self.tokens = tokens

    def change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``change`` of it, which selects along the batch dimension."""
        if self.groups is not None:
            self.groups = self.groups.map(change)
