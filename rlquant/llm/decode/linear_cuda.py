"""A linear layer of a decode step as one Triton kernel: norm, product with packed or dense weights, adapter, residual.

With one token of each sequence a layer is a thin matrix product, and what it costs is launches and waiting, not work.
So one kernel does all that belongs to a product: the RMSNorm before it is a factor of each row, applied afterwards,
the adapter's two products go along, the residual or SwiGLU comes last. bitsandbytes' NF4 codes are read in place, each
value rounded to the dtype of the states as it is in training.

Inner sizes are split over programs. The last one to finish a tile adds the parts in their order, whoever came first, so
results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FIELDS", "linear_kernel"]

FIELDS = 12
"""Of a segment in its table, int64: addresses of codes or weight, scales' codes, their ranges, their levels, their
offset, NF4's values, bias, A, B; outputs; the first of its columns in the result; inner scales (bool)."""

_BLOCK = tl.constexpr(64)
_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _scale(row, column, at, table):
    """Of blocks of 64 codes, float32 ``[rows]``."""
    block = row * (at // _BLOCK) + column // _BLOCK
    nested = tl.load(table + 11)
    if nested:
        codes = tl.load(table + 1).to(tl.pointer_type(tl.uint8))
        ranges = tl.load(table + 2).to(tl.pointer_type(tl.float32))
        levels = tl.load(table + 3).to(tl.pointer_type(tl.float32))
        offset = tl.load(tl.load(table + 4).to(tl.pointer_type(tl.float32)))
        scale = (
            tl.load(levels + tl.load(codes + block).to(tl.int32)) * tl.load(ranges + block // 256) + offset
        )
    else:
        scale = tl.load(tl.load(table + 1).to(tl.pointer_type(tl.float32)) + block)
    return scale


@triton.jit
def _product(
    x, norm, table, first, row, live, size, begin, end,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, NF4: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """``[ROWS, COLUMNS]``, a segment's columns from ``first`` on, blocks ``begin`` to ``end``; sums of squares."""
    dtype = x.dtype.element_ty
    width = tl.load(table + 9)
    column = first + tl.arange(0, COLUMNS)
    column = tl.minimum(column, width - 1)  # what is read twice is not stored
    half = tl.arange(0, 32)
    values = tl.load(table + 5).to(tl.pointer_type(tl.float32))
    codes = tl.load(table).to(tl.pointer_type(tl.uint8))
    weight = tl.load(table).to(tl.pointer_type(dtype))
    a = tl.load(table + 7).to(tl.pointer_type(dtype))
    b = tl.load(table + 8).to(tl.pointer_type(dtype))
    rank = tl.arange(0, RANK if RANK > 0 else 16)
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    down = tl.zeros((ROWS, RANK if RANK > 0 else 16), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for block in range(begin, end):
        even = block * 64 + 2 * half
        left = tl.load(x + row[:, None] * size + even[None, :], mask=live[:, None], other=0.0)
        right = tl.load(x + row[:, None] * size + even[None, :] + 1, mask=live[:, None], other=0.0)
        if NORM:
            exact, other = left.to(tl.float32), right.to(tl.float32)
            squares += tl.sum(exact * exact + other * other, axis=1)
            left = (exact * tl.load(norm + even).to(tl.float32)[None, :]).to(dtype)
            right = (other * tl.load(norm + even + 1).to(tl.float32)[None, :]).to(dtype)
        if NF4:
            packed = tl.load(codes + column[:, None] * (size // 2) + block * 32 + half[None, :]).to(tl.int32)
            scale = _scale(column, block * 64, size, table)[:, None]
            high = (tl.load(values + (packed >> 4)) * scale).to(dtype)
            low = (tl.load(values + (packed & 15)) * scale).to(dtype)
        else:
            high = tl.load(weight + column[:, None] * size + even[None, :])
            low = tl.load(weight + column[:, None] * size + even[None, :] + 1)
        sum = tl.dot(left, tl.trans(high), sum, input_precision="ieee")
        sum = tl.dot(right, tl.trans(low), sum, input_precision="ieee")
        if RANK > 0:
            place = a + rank[:, None] * size + even[None, :]
            down = tl.dot(left, tl.trans(tl.load(place)), down, input_precision="ieee")
            down = tl.dot(right, tl.trans(tl.load(place + 1)), down, input_precision="ieee")
    if RANK > 0:
        up = tl.load(b + column[:, None] * RANK + rank[None, :])
        sum = tl.dot(down.to(dtype), tl.trans(up), sum, input_precision="ieee")
    return sum, squares


@triton.jit
def linear_kernel(
    x, norm, table, tiles, residual, out, parts, arrived, rows, size, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, NF4: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A tile, or a part of its inner sum: ``out = [residual +] layer([norm] x)``, or ``silu(gate) * up`` of two.

    ``x`` is ``[rows, size]``, ``out`` and ``residual`` ``[rows, width]``. ``tiles``: int32 ``[tiles, 2]``, segment and
    first column; a gate's segment is before its partner. ``parts``: float32 scratch. ``arrived``: int32, zeros, one for
    each tile and group of rows, and zeros again afterwards.
    """
    tile, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = group * ROWS + tl.arange(0, ROWS)
    live = row < rows
    mine = table + tl.load(tiles + 2 * tile) * _FIELDS
    first = tl.load(tiles + 2 * tile + 1)
    blocks = size // _BLOCK
    begin, end = part * blocks // SPLIT, (part + 1) * blocks // SPLIT
    sum, squares = _product(x, norm, mine, first, row, live, size, begin, end, ROWS, COLUMNS, RANK, NF4, NORM)
    other = sum
    if GATED:
        other, _ = _product(
            x, norm, mine + _FIELDS, first, row, live, size, begin, end, ROWS, COLUMNS, RANK, NF4, NORM
        )
    last = True
    if SPLIT > 1:
        kept: tl.constexpr = ROWS * (COLUMNS * (2 if GATED else 1) + 1)
        place = tile * tl.num_programs(1) + group
        base = parts + place * SPLIT * kept
        at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        own = base + part * kept
        tl.store(own + tl.arange(0, ROWS), squares)
        tl.store(own + ROWS + at, sum)
        if GATED:
            tl.store(own + ROWS + ROWS * COLUMNS + at, other)
        tl.debug_barrier()  # all threads' stores are before the count
        last = tl.atomic_add(arrived + place, 1, sem="acq_rel") == SPLIT - 1
        if last:
            sum, other = tl.zeros_like(sum), tl.zeros_like(other)
            squares = tl.zeros_like(squares)
            for each in range(SPLIT):
                seen = base + each * kept
                squares += tl.load(seen + tl.arange(0, ROWS), cache_modifier=".cg")
                sum += tl.load(seen + ROWS + at, cache_modifier=".cg")
                if GATED:
                    other += tl.load(seen + ROWS + ROWS * COLUMNS + at, cache_modifier=".cg")
            tl.store(arrived + place, 0)
    if last:
        factor = tl.rsqrt(squares / size + eps) if NORM else squares
        sum = _with_bias(sum, mine, x, first, factor, COLUMNS, NORM)
        if GATED:
            sum = sum * tl.sigmoid(sum) * _with_bias(other, mine + _FIELDS, x, first, factor, COLUMNS, NORM)
        column = first + tl.arange(0, COLUMNS)
        place = row[:, None] * width + (tl.load(mine + 10).to(tl.int32) + column)[None, :]
        stored = live[:, None] & (column < tl.load(mine + 9))[None, :]
        if RESIDUAL:
            sum += tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + place, sum.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _with_bias(sum, table, x, first, factor, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """With the factor of the norm, and the bias where there is one."""
    if NORM:
        sum = sum * factor[:, None]
    address = tl.load(table + 6)
    column = first + tl.arange(0, COLUMNS)
    there = column < tl.where(address != 0, tl.load(table + 9), 0)
    bias = address.to(tl.pointer_type(x.dtype.element_ty))
    return sum + tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
