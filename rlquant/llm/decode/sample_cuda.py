"""The last layer of a decode step and the choice of a token, without logits in memory: two Triton kernels.

The first computes the logits of a tile of the vocabulary and keeps of them what the second needs to join the tiles: the
largest, the sum for the log-softmax, and the winner of an exponential race, which is a sample from the softmax (the
Gumbel-max trick; Maddison et al. 2014, arXiv:1411.0030). The race's numbers are those of ``sampling.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlquant.llm.decode.linear_cuda import row_factor
from rlquant.llm.decode.overlap_cuda import await_previous

__all__ = ["FOUND", "choose_kernel", "head_kernel"]

FOUND = 5
"""Of a row and a tile, float32: the winner's score, its logit, its number in the tile, the largest logit, the sum of
exponentials beside that. A logit that is no number makes the sum one that is none."""

_FOUND = tl.constexpr(FOUND)


@triton.jit
def _mixed(x):
    """lowbias32 (Wellons 2018), a bijection of uint32 whose bits look random."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _stream(seed, place):
    """SplitMix64's number of a seed and a place, see ``sampling.stream``; int64 to uint64."""
    x = seed.to(tl.uint64) + (place + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _exponential(stream, number):
    """Standard exponential numbers, see ``sampling.exponential``; uint32 ``[rows, 1]``, ``[1, columns]``."""
    low, high = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    bits = _mixed(_mixed(number.to(tl.uint32)[None, :] ^ low[:, None]) ^ high[:, None])
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return tl.where(u < 0.015625, small, -tl.log(tl.maximum(1.0 - u, 2.9802322387695312e-08)))


@triton.jit(do_not_specialize=["rows"])
def head_kernel(
    x, squares, weight, seeds, places, out, rows, size, vocabulary, tiles, eps, cooling,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GREEDY: tl.constexpr, NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """``out``: float32 ``[rows, tiles, FOUND]``. ``x``: ``[rows, size]``, after the last norm but for its factor, see
    ``linear_cuda.py`` for that and ``squares``. ``weight``: ``[vocabulary, size]``. ``seeds``, ``places``: int64
    ``[rows]``. ``cooling``: 1 / temperature."""
    tile, group = tl.program_id(0), tl.program_id(1)
    await_previous(OVERLAP)
    dtype = weight.dtype.element_ty
    row = group * ROWS + tl.arange(0, ROWS)
    live = row < rows
    number = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = number < vocabulary
    place = weight + tl.minimum(number, vocabulary - 1).to(tl.int64)[:, None] * size
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    if x.dtype.element_ty != dtype:
        factor = row_factor(squares, row, live, size, tiles, eps, NORM)
    for start in range(0, size, INNER):
        inner = start + tl.arange(0, INNER)
        inside = inner < size
        part = tl.load(
            x + row[:, None] * size + inner[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        if x.dtype.element_ty != dtype:
            part = (part * factor[:, None]).to(dtype)
        each = tl.load(place + inner[None, :], mask=inside[None, :], other=0.0)
        logits = tl.dot(part, tl.trans(each), logits, input_precision="ieee")
    if x.dtype.element_ty == dtype:
        logits *= row_factor(squares, row, live, size, tiles, eps, NORM)[:, None]
    logits = logits.to(dtype).to(tl.float32) * cooling
    masked = tl.where(there[None, :], logits, float("-inf"))
    score = masked
    if not GREEDY:
        stream = _stream(tl.load(seeds + row, mask=live, other=0), tl.load(places + row, mask=live, other=0))
        score = masked - tl.log(_exponential(stream, number))
    best = tl.argmax(score, axis=1)
    highest = tl.max(masked, axis=1)
    chosen = tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == best[:, None], masked, 0.0), axis=1)
    total = tl.sum(tl.exp(masked - highest[:, None]), axis=1)
    # inf - inf and what is computed with NaN make the sum NaN; a maximum may pass over one
    total += tl.sum(tl.where(there[None, :], (logits - logits) * 0.0, 0.0), axis=1)
    at = out + (row * tl.num_programs(0) + tile) * _FOUND
    tl.store(at, tl.max(score, axis=1), mask=live)
    tl.store(at + 1, chosen, mask=live)
    tl.store(at + 2, best.to(tl.float32), mask=live)
    tl.store(at + 3, highest, mask=live)
    tl.store(at + 4, total, mask=live)


@triton.jit
def choose_kernel(
    found,
    tokens,
    positions,
    places,
    drawn,
    tiles,
    slots,
    length,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A row's token, and what the next step needs of it.

    ``tokens``, ``positions``, ``places``: int64 ``[rows]``, written; positions stay below ``length``. ``drawn``:
    float32 ``[3, slots]``: the token, its log-probability, 1 where all logits are finite.
    """
    row = tl.program_id(0)
    await_previous(OVERLAP)
    tile = tl.arange(0, TILES)
    there = tile < tiles
    at = found + (row * tiles + tile) * _FOUND
    score = tl.load(at, mask=there, other=float("-inf"))
    highest = tl.load(at + 3, mask=there, other=float("-inf"))
    total = tl.load(at + 4, mask=there, other=0.0)
    peak = tl.max(highest, axis=0)
    sum = tl.sum(tl.where(there, total * tl.exp(highest - peak), 0.0), axis=0)
    winner = tl.argmax(score, axis=0)
    best = found + (row * tiles + winner) * _FOUND
    token = winner * COLUMNS + tl.load(best + 2).to(tl.int32)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(positions + row, tl.minimum(tl.load(positions + row) + 1, length - 1))
    tl.store(places + row, tl.load(places + row) + 1)
    tl.store(drawn + row, token.to(tl.float32))
    tl.store(drawn + slots + row, tl.load(best + 1) - peak - tl.log(sum))
    tl.store(drawn + 2 * slots + row, tl.where((sum - sum) == 0.0, 1.0, 0.0))
