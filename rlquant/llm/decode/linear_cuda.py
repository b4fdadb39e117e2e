"""A linear layer of a decode step as one Triton kernel: norm, product with packed or dense weights, adapter, residual.

With one token of each sequence a layer is a thin matrix product, and what it costs is launches and waiting, not work.
So one kernel does all that belongs to a product. A layer that adds to the hidden states also prepares the RMSNorm that
follows: the states times its weights, and their squares; the factor of each row is applied after the next product. In
float16, which does not reach as far as such states do, they are kept in float32, and get it before that product.
The adapter's two products go along, SwiGLU comes last. bitsandbytes' NF4 codes are read in place, each value rounded to
the dtype of the states as it is in training.

Inner sizes are split over programs. The last one to finish a tile adds the parts in their order, whoever came first, so
results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlquant.llm.decode.overlap_cuda import await_previous

__all__ = ["FIELDS", "linear_kernel", "normed_kernel", "row_factor"]

FIELDS = 12
"""Of a tile in its table, int64: addresses of codes or weight, scales' codes, their ranges, their levels, their offset,
NF4's values, bias, A, B; outputs of its layer; where these are in the result; the first of the tile's columns."""

_FIELDS = tl.constexpr(FIELDS)
_BLOCK = tl.constexpr(64)
"""Inputs that share a scale."""


@triton.jit
def _address(table, field: tl.constexpr, kind: tl.constexpr):
    """A pointer of the table; tensors begin at multiples of 16 bytes, which lets their loads be wide."""
    return tl.multiple_of(tl.load(table + field).to(tl.pointer_type(kind)), 16)


@triton.jit
def _scales(block, exists, table, NESTED: tl.constexpr):
    """Of blocks of 64 codes, float32."""
    if NESTED:
        codes = tl.load(_address(table, 1, tl.uint8) + block, mask=exists, other=0).to(tl.int32)
        ranges = tl.load(_address(table, 2, tl.float32) + block // 256, mask=exists, other=0.0)
        offset = tl.load(_address(table, 4, tl.float32))
        scale = tl.load(_address(table, 3, tl.float32) + codes) * ranges + offset
    else:
        scale = tl.load(_address(table, 1, tl.float32) + block, mask=exists, other=0.0)
    return scale


@triton.jit
def _levels(packed, table, SHUFFLE: tl.constexpr):
    """NF4's values of the high and the low codes of bytes, float32.

    A lane of a warp holds one of the 16 and the others ask it for theirs: half the instructions of reading from memory,
    and Triton is free to keep the values in whatever threads it likes.
    """
    if SHUFFLE:
        high, low = tl.inline_asm_elementwise(
            """{
            .reg .u32 lane, value, code;
            .reg .u64 at;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 at, lane, 4, $9;
            ld.global.nc.u32 value, [at];
            shr.u32 code, $8, 4;
            shfl.sync.idx.b32 $0, value, code, 0x101f, 0xffffffff;
            shfl.sync.idx.b32 $4, value, $8, 0x101f, 0xffffffff;
            shr.u32 code, $8, 12;
            shfl.sync.idx.b32 $1, value, code, 0x101f, 0xffffffff;
            shr.u32 code, $8, 8;
            shfl.sync.idx.b32 $5, value, code, 0x101f, 0xffffffff;
            shr.u32 code, $8, 20;
            shfl.sync.idx.b32 $2, value, code, 0x101f, 0xffffffff;
            shr.u32 code, $8, 16;
            shfl.sync.idx.b32 $6, value, code, 0x101f, 0xffffffff;
            shr.u32 code, $8, 28;
            shfl.sync.idx.b32 $3, value, code, 0x101f, 0xffffffff;
            shr.u32 code, $8, 24;
            shfl.sync.idx.b32 $7, value, code, 0x101f, 0xffffffff;
            }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,l,l,l,l",
            args=[packed, tl.load(table + 5)],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
    else:
        values = _address(table, 5, tl.float32)
        codes = packed.to(tl.int32)
        high, low = tl.load(values + (codes >> 4)), tl.load(values + (codes & 15))
    return high, low


@triton.jit
def _unpacked(
    table, column, part, blocks, dtype: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    NESTED: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """NF4 weights, ``[COLUMNS, 64 BLOCKS]``."""
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    exists = (block < blocks)[None, :]
    number = column[:, None] * blocks + block[None, :]
    place = number[:, :, None] * (_BLOCK // 2) + tl.arange(0, _BLOCK // 2)[None, None, :]
    packed = tl.load(_address(table, 0, tl.uint8) + place, mask=exists[:, :, None], other=0)
    scale = _scales(number, exists, table, NESTED)[:, :, None]
    high, low = _levels(packed, table, SHUFFLE)
    both = tl.join((high * scale).to(dtype), (low * scale).to(dtype))
    return tl.reshape(both, (COLUMNS, BLOCKS * _BLOCK))


@triton.jit
def _product(
    x, squares, table, row, live, part, blocks, tiles, eps, dtype: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr, KIND: tl.constexpr, NESTED: tl.constexpr,
    SHUFFLE: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``[rows, COLUMNS]``, of BLOCKS blocks of inputs.

    Without a loop: all that is read is asked for at once, and no load waits for another but scales for their codes.
    Weights are read and unpacked before what the kernel before this one writes.
    """
    first, width = tl.load(table + 11).to(tl.int32), tl.load(table + 9).to(tl.int32)
    column = tl.minimum(first + tl.arange(0, COLUMNS), width - 1)  # read twice, not stored
    size = blocks * _BLOCK
    inner = part * (BLOCKS * _BLOCK) + tl.arange(0, BLOCKS * _BLOCK)
    there = (inner < size)[None, :]
    if KIND == 1:
        weight = _unpacked(table, column, part, blocks, dtype, COLUMNS, BLOCKS, NESTED, SHUFFLE)
    elif KIND == 2:
        place = column[:, None] * size + inner[None, :]
        weight = tl.load(_address(table, 0, tl.int8) + place, mask=there, other=0).to(dtype)
    else:
        place = column[:, None] * size + inner[None, :]
        weight = tl.load(_address(table, 0, dtype) + place, mask=there, other=0.0)
    if KIND == 2:
        scale = tl.load(_address(table, 1, tl.float32) + column)
    if RANK > 0:
        rank = tl.arange(0, RANK)
        a = tl.load(_address(table, 7, dtype) + rank[:, None] * size + inner[None, :], mask=there, other=0.0)
        b = tl.load(_address(table, 8, dtype) + column[:, None] * RANK + rank[None, :])
    await_previous(OVERLAP)
    states = tl.load(x + row[:, None] * size + inner[None, :], mask=live[:, None] & there, other=0.0)
    if x.dtype.element_ty != dtype:
        states = (states * row_factor(squares, row, live, size, tiles, eps, NORM)[:, None]).to(dtype)
    sum = tl.dot(states, tl.trans(weight), input_precision="ieee")
    if KIND == 2:
        sum *= scale[None, :]
    if RANK > 0:
        down = tl.dot(states, tl.trans(a), input_precision="ieee").to(dtype)
        sum = tl.dot(down, tl.trans(b), sum, input_precision="ieee")
    return sum


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, squares, table, out, norm, normed, parts, arrived, rows, blocks, width, tiles, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr,
    KIND: tl.constexpr, NESTED: tl.constexpr, SHUFFLE: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr,
    NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A tile, or a part of its inner sum: ``out = layer(x)``, ``silu(gate(x)) * up(x)``, or, ADDS, ``out += layer(x)``.

    ``x``: ``[rows, 64 blocks]``; ``out``: ``[rows, width]``. Without ADDS, ``x`` lacks the factor of its norm, which
    is that of ``squares``: float32 ``[rows, tiles]``, at most NORM tiles; where ``x`` is of another dtype than ``out``
    it gets the factor before it is rounded to that, else after the product. ADDS: ``normed``: ``[rows, width]``,
    without that factor, and ``squares`` are written for the next norm, of the weights ``norm``: ``[width]``.
    ``table``: see :data:`FIELDS`; a tile's gate is before its partner. ``parts``: float32 scratch. ``arrived``: int32,
    zeros, one for each tile and group of rows, and zeros again afterwards. A part is BLOCKS blocks of 64 inputs; SPLIT
    parts are all. KIND: 0 dense, 1 NF4, 2 int8 with a scale for each output.
    """
    tile, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = group * ROWS + tl.arange(0, ROWS)
    live = row < rows
    dtype: tl.constexpr = out.dtype.element_ty
    first = table + tile * (2 * _FIELDS if GATED else _FIELDS)
    mine, piece = first, part
    if GATED:
        mine, piece = first + part // SPLIT * _FIELDS, part % SPLIT
    sum = _product(
        x, squares, mine, row, live, piece, blocks, tiles, eps, dtype, COLUMNS, BLOCKS, RANK, KIND, NESTED, SHUFFLE,
        NORM, OVERLAP,
    )  # fmt: skip
    other = sum
    last = True
    if SPLIT > 1 or GATED:
        number = tile * tl.num_programs(1) + group
        inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        kept: tl.constexpr = ROWS * COLUMNS
        base = parts + number * tl.num_programs(2) * kept + inner
        tl.store(base + part * kept, sum, mask=live[:, None])
        tl.debug_barrier()  # all threads' stores are before the count
        last = tl.atomic_add(arrived + number, 1, sem="acq_rel") == tl.num_programs(2) - 1
        if last:
            sum = _joined(base, live, SPLIT, kept)
            if GATED:
                other = _joined(base + SPLIT * kept, live, SPLIT, kept)
            tl.store(arrived + number, 0)
    if last:
        if not ADDS and x.dtype.element_ty == dtype:
            factor = row_factor(squares, row, live, blocks * _BLOCK, tiles, eps, NORM)
            sum *= factor[:, None]
            other *= factor[:, None]
        sum = _with_bias(sum, first, dtype, COLUMNS)
        if GATED:
            sum = sum * tl.sigmoid(sum) * _with_bias(other, first + _FIELDS, dtype, COLUMNS)
        column = tl.load(first + 11).to(tl.int32) + tl.arange(0, COLUMNS)
        inside = column < tl.load(first + 9)
        stored = live[:, None] & inside[None, :]
        place = row[:, None] * width + (tl.load(first + 10).to(tl.int32) + column)[None, :]
        if ADDS:
            sum += tl.load(out + place, mask=stored, other=0.0).to(tl.float32)
            exact = tl.where(inside[None, :], sum.to(dtype).to(tl.float32), 0.0)
            weight = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(normed + place, (exact * weight[None, :]).to(normed.dtype.element_ty), mask=stored)
            tl.store(squares + row * tiles + tile, tl.sum(exact * exact, axis=1), mask=live)
        tl.store(out + place, sum.to(dtype), mask=stored)


@triton.jit
def _joined(base, live, SPLIT: tl.constexpr, KEPT: tl.constexpr):
    """The sum of parts in their order."""
    sum = tl.load(base, mask=live[:, None], other=0.0, cache_modifier=".cg")
    for each in tl.static_range(1, SPLIT):
        sum += tl.load(base + each * KEPT, mask=live[:, None], other=0.0, cache_modifier=".cg")
    return sum


@triton.jit
def row_factor(squares, row, live, size, tiles, eps, NORM: tl.constexpr):
    """Of the norm of rows."""
    tile = tl.arange(0, NORM)
    there = live[:, None] & (tile < tiles)[None, :]
    found = tl.load(squares + row[:, None] * tiles + tile[None, :], mask=there, other=0.0)
    return tl.rsqrt(tl.sum(found, axis=1) / size + eps)


@triton.jit
def _with_bias(sum, table, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """With the bias where there is one."""
    address = tl.load(table + 6)
    column = tl.load(table + 11).to(tl.int32) + tl.arange(0, COLUMNS)
    there = column < tl.where(address != 0, tl.load(table + 9), 0)
    bias = address.to(tl.pointer_type(dtype))
    return sum + tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normed_kernel(
    tokens, embeddings, norm, hidden, normed, squares, size, tiles, SIZE: tl.constexpr, TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """A token's embedding, ready for the first norm as :func:`linear_kernel` leaves it for the others.

    ``tokens``: int64 ``[rows]``; ``embeddings``: ``[vocabulary, size]``; SIZE and TILES: powers of 2 not below.
    """
    row = tl.program_id(0)
    await_previous(OVERLAP)
    column, tile = tl.arange(0, SIZE), tl.arange(0, TILES)
    there = column < size
    found = tl.load(embeddings + tl.load(tokens + row) * size + column, mask=there, other=0.0)
    dtype: tl.constexpr = hidden.dtype.element_ty
    exact = found.to(dtype).to(tl.float32)
    weight = tl.load(norm + column, mask=there, other=0.0).to(tl.float32)
    tl.store(hidden + row * size + column, found.to(dtype), mask=there)
    tl.store(normed + row * size + column, (exact * weight).to(normed.dtype.element_ty), mask=there)
    total = tl.sum(exact * exact, axis=0)
    tl.store(squares + row * tiles + tile, tl.where(tile == 0, total, 0.0), mask=tile < tiles)
