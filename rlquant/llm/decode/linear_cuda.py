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

_FIELDS = tl.constexpr(FIELDS)
_PACKED = tl.constexpr(32)
"""Bytes of a block of 64 codes."""


@triton.jit
def _address(table, field: tl.constexpr, kind: tl.constexpr):
    """A pointer of the table; tensors begin at multiples of 16 bytes, which lets their loads be wide."""
    return tl.multiple_of(tl.load(table + field), 16).to(tl.pointer_type(kind))


@triton.jit
def _pair(words, dtype: tl.constexpr):
    """The values of even and of odd places, of two values in a word: NF4's codes lie in pairs too."""
    if dtype.primitive_bitwidth == 16:
        left = words.to(tl.int16).to(dtype, bitcast=True)
        right = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    else:
        left = words.to(tl.int32).to(dtype, bitcast=True)
        right = (words >> 32).to(tl.int32).to(dtype, bitcast=True)
    return left, right


@triton.jit
def _scales(block, exists, table):
    """Of blocks of 64 codes, float32."""
    nested = tl.load(table + 11)
    if nested:
        codes = tl.load(_address(table, 1, tl.uint8) + block, mask=exists, other=0).to(tl.int32)
        ranges = tl.load(_address(table, 2, tl.float32) + block // 256, mask=exists, other=0.0)
        offset = tl.load(_address(table, 4, tl.float32))
        scale = tl.load(_address(table, 3, tl.float32) + codes) * ranges + offset
    else:
        scale = tl.load(_address(table, 1, tl.float32) + block, mask=exists, other=0.0)
    return scale


@triton.jit
def _product(
    x, norm, table, first, row, live, half, part, dtype: tl.constexpr, word: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr, NF4: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """``[ROWS, COLUMNS]``, a segment's columns from ``first`` on, of BLOCKS blocks of inputs; sums of squares.

    Without a loop: all that is read is asked for at once, and no load waits for another but scales for their codes.
    """
    column = tl.minimum(
        first + tl.arange(0, COLUMNS), tl.load(table + 9).to(tl.int32) - 1
    )  # read twice, not stored
    inner = part * (BLOCKS * _PACKED) + tl.arange(0, BLOCKS * _PACKED)
    there = inner < half
    words = tl.load(x + row[:, None] * half + inner[None, :], mask=live[:, None] & there[None, :], other=0)
    place = column[:, None] * half + inner[None, :]
    if NF4:
        packed = tl.load(_address(table, 0, tl.uint8) + place, mask=there[None, :], other=0).to(tl.int32)
        block = part * BLOCKS + tl.arange(0, BLOCKS)
        blocks = half // _PACKED
        scale = _scales(column[:, None] * blocks + block[None, :], (block < blocks)[None, :], table)
        scale = tl.broadcast_to(scale[:, :, None], (COLUMNS, BLOCKS, _PACKED))
        scale = tl.reshape(scale, (COLUMNS, BLOCKS * _PACKED))
        values = _address(table, 5, tl.float32)
        high = (tl.load(values + (packed >> 4)) * scale).to(dtype)
        low = (tl.load(values + (packed & 15)) * scale).to(dtype)
    else:
        high, low = _pair(tl.load(_address(table, 0, word) + place, mask=there[None, :], other=0), dtype)
    left, right = _pair(words, dtype)
    squares = tl.zeros((ROWS,), tl.float32)
    if NORM:
        exact, other = left.to(tl.float32), right.to(tl.float32)
        squares += tl.sum(exact * exact + other * other, axis=1)
        even, odd = _pair(tl.load(norm + inner, mask=there, other=0), dtype)
        left = (exact * even.to(tl.float32)[None, :]).to(dtype)
        right = (other * odd.to(tl.float32)[None, :]).to(dtype)
    sum = tl.dot(left, tl.trans(high), input_precision="ieee")
    sum = tl.dot(right, tl.trans(low), sum, input_precision="ieee")
    if RANK > 0:
        rank = tl.arange(0, RANK)
        at = _address(table, 7, word) + rank[:, None] * half + inner[None, :]
        even, odd = _pair(tl.load(at, mask=there[None, :], other=0), dtype)
        down = tl.dot(left, tl.trans(even), input_precision="ieee")
        down = tl.dot(right, tl.trans(odd), down, input_precision="ieee")
        up = tl.load(_address(table, 8, dtype) + column[:, None] * RANK + rank[None, :])
        sum = tl.dot(down.to(dtype), tl.trans(up), sum, input_precision="ieee")
    return sum, squares


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, norm, table, tiles, residual, out, parts, arrived, rows, half, width, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr,
    RANK: tl.constexpr, NF4: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """A tile, or a part of its inner sum: ``out = [residual +] layer([norm] x)``, or ``silu(gate) * up`` of two.

    ``x``: ``[rows, half]`` and ``norm``: ``[half]``, two values in each word; ``out`` and ``residual``: ``[rows,
    width]``. ``tiles``: int32 ``[tiles, 2]``, segment and first column; a gate's segment is before its partner.
    ``parts``: float32 scratch. ``arrived``: int32, zeros, one for each tile and group of rows, and zeros again
    afterwards. A part is BLOCKS blocks of 64 inputs; SPLIT parts are all.
    """
    tile, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = group * ROWS + tl.arange(0, ROWS)
    live = row < rows
    mine = table + tl.load(tiles + 2 * tile) * _FIELDS
    first = tl.load(tiles + 2 * tile + 1)
    dtype: tl.constexpr = out.dtype.element_ty
    word: tl.constexpr = x.dtype.element_ty
    sum, squares = _product(
        x, norm, mine, first, row, live, half, part, dtype, word, ROWS, COLUMNS, BLOCKS, RANK, NF4, NORM
    )
    other = sum
    if GATED:
        partner = mine + _FIELDS
        other, _ = _product(
            x, norm, partner, first, row, live, half, part, dtype, word, ROWS, COLUMNS, BLOCKS, RANK, NF4, NORM
        )  # fmt: skip
    last = True
    if SPLIT > 1:
        kept: tl.constexpr = ROWS * (COLUMNS * (2 if GATED else 1) + 1)
        number = tile * tl.num_programs(1) + group
        base = parts + number * SPLIT * kept
        inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        own = base + part * kept
        tl.store(own + tl.arange(0, ROWS), squares)
        tl.store(own + ROWS + inner, sum)
        if GATED:
            tl.store(own + ROWS + ROWS * COLUMNS + inner, other)
        tl.debug_barrier()  # all threads' stores are before the count
        last = tl.atomic_add(arrived + number, 1, sem="acq_rel") == SPLIT - 1
        if last:
            sum, other = tl.zeros_like(sum), tl.zeros_like(other)
            squares = tl.zeros_like(squares)
            for each in range(SPLIT):
                seen = base + each * kept
                squares += tl.load(seen + tl.arange(0, ROWS), cache_modifier=".cg")
                sum += tl.load(seen + ROWS + inner, cache_modifier=".cg")
                if GATED:
                    other += tl.load(seen + ROWS + ROWS * COLUMNS + inner, cache_modifier=".cg")
            tl.store(arrived + number, 0)
    if last:
        factor = tl.rsqrt(squares / (2 * half) + eps) if NORM else squares
        sum = _with_bias(sum, mine, first, factor, dtype, COLUMNS, NORM)
        if GATED:
            sum = (
                sum * tl.sigmoid(sum) * _with_bias(other, mine + _FIELDS, first, factor, dtype, COLUMNS, NORM)
            )
        column = first + tl.arange(0, COLUMNS)
        place = row[:, None] * width + (tl.load(mine + 10).to(tl.int32) + column)[None, :]
        stored = live[:, None] & (column < tl.load(mine + 9))[None, :]
        if RESIDUAL:
            sum += tl.load(residual + place, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + place, sum.to(dtype), mask=stored)


@triton.jit
def _with_bias(sum, table, first, factor, dtype: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr):
    """With the factor of the norm, and the bias where there is one."""
    if NORM:
        sum = sum * factor[:, None]
    address = tl.load(table + 6)
    column = first + tl.arange(0, COLUMNS)
    there = column < tl.where(address != 0, tl.load(table + 9), 0)
    bias = address.to(tl.pointer_type(dtype))
    return sum + tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
