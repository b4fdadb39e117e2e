"""The inner loop of GPTQ as one Triton kernel a block of columns, where PyTorch launches ten kernels a column.

Rows do not depend on each other, so a program takes some of them through all columns of a block, in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlquant.quant.affine import QParams
from rlquant.quant.formats import Format

__all__ = ["round_block"]

_ROWS = 32
_RINT = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest, half to even
_EXACT = tl.constexpr(4194304.0)  # for magnitudes up to 2**22


def round_block(weight: Tensor, start: int, spread: QParams, upper: Tensor, fmt: Format) -> Tensor:
    """Round a block of columns in place.

    Args:
        weight: float32 ``[block, rows]``, contiguous: row i is the column ``start + i`` of the matrix.
        start: the block's first column.
        spread: of all columns, ``[columns or 1, rows or 1]``.
        upper: float32 ``[columns, columns]``, see :class:`~rlquant.quant.compensate.Factor`.
        fmt: integers.

    Returns:
        Errors in units of the factor's diagonal, float32 ``[block, rows]``.
    """
    width, rows = weight.shape
    errors = torch.empty_like(weight)
    point = spread.zero_point
    scale_strides = _strides(spread.scale)
    point_strides = (0, 0) if point is None else _strides(point)
    _round_block[(triton.cdiv(rows, _ROWS),)](
        weight, errors, upper, spread.scale, spread.scale if point is None else point,
        width, rows, start, upper.stride(0), *scale_strides, *point_strides, 0.0 if point is not None else -fmt.max,
        fmt.max, point is not None, triton.next_power_of_2(width), _ROWS, num_warps=1,
    )  # fmt: skip
    return errors


def _strides(values: Tensor) -> tuple[int, int]:
    """From column to column and from row to row; 0 where one value is for all."""
    return tuple(0 if size == 1 else values.stride(at) for at, size in enumerate(values.shape))  # type: ignore[return-value]


@triton.jit
def _round_block(
    weight, errors, upper, scale, point,
    width, rows, start, upper_stride, scale_column, scale_row, point_column, point_row, low, high,
    has_point: tl.constexpr, block_width: tl.constexpr, block_rows: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_width)
    inside = (column < width)[:, None] & (row < rows)[None, :]
    at = column[:, None] * rows + row[None, :]
    tile = tl.load(weight + at, mask=inside, other=0.0)
    for i in range(width):
        j = start + i
        value = tl.sum(tl.where(column[:, None] == i, tile, 0.0), axis=0)
        step = tl.load(scale + j * scale_column + row * scale_row, mask=row < rows, other=1.0)
        grid = value * tl.math.div_rn(1.0, step)
        grid = tl.minimum(tl.maximum(grid, -_EXACT), _EXACT)
        grid = (grid + _RINT) - _RINT
        zero = 0.0
        if has_point:
            zero = tl.load(point + j * point_column + row * point_row, mask=row < rows, other=0).to(
                tl.float32
            )
        grid = tl.minimum(tl.maximum(grid + zero, low), high)
        rounded = (grid - zero) * step
        error = tl.math.div_rn(value - rounded, tl.load(upper + j * upper_stride + j))
        share = tl.load(upper + j * upper_stride + start + column, mask=column < width, other=0.0)
        later = tile - share[:, None] * error[None, :]
        here = column[:, None]
        tile = tl.where(here == i, rounded[None, :], tl.where(here > i, later, tile))
        tl.store(errors + i * rows + row, error, mask=row < rows)
    tl.store(weight + at, tile, mask=inside)
