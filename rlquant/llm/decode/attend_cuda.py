"""Attention of a decode step as one Triton kernel: rotary positions, the cache's new entry, grouped-query attention.

A program reads the cached tokens of one sequence and one key-value head, for all query heads of its group at once; long
sequences are split over several programs, whose results the last one joins in their order (Flash-Decoding, Dao et al.
2023). The new token's key and value go into the cache, and are attended to from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_kernel"]


@triton.jit
def _turned(base, cos, sin, weight, eps, live, HALF: tl.constexpr, NORM: tl.constexpr):
    """Both halves of heads' vectors at ``base``, normed where the architecture does so, at their position; float32."""
    half = tl.arange(0, HALF)
    left = tl.load(base[:, None] + half[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    right = tl.load(base[:, None] + HALF + half[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(left * left + right * right, axis=1)
        factor = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        left = left * factor * tl.load(weight + half).to(tl.float32)[None, :]
        right = right * factor * tl.load(weight + HALF + half).to(tl.float32)[None, :]
    return left * cos - right * sin, right * cos + left * sin


@triton.jit
def attend_kernel(
    states, positions, cosines, sines, query_norm, key_norm, keys, values, out, parts, arrived,
    heads, kv_heads, length, scaling, eps,
    HALF: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One key-value head of one sequence, or a part of its tokens.

    ``states``: ``[slots, (heads + 2 kv_heads) * size]``, queries, keys, values of the new tokens; ``positions``: int64
    ``[slots]``; ``cosines``, ``sines``: ``[length, size]``; ``keys``, ``values``: ``[slots, kv_heads, length, size]``
    of a layer; ``out``: ``[slots, heads * size]``. ``parts`` and ``arrived`` as in ``linear_cuda.py``. A size is twice
    HALF; HEADS is GROUP, the query heads of a key-value head, filled up to 16.
    """
    slot, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = 2 * HALF
    dtype = states.dtype.element_ty
    position = tl.load(positions + slot)
    half = tl.arange(0, HALF)
    cos = tl.load(cosines + position * size + half).to(tl.float32)[None, :]
    sin = tl.load(sines + position * size + half).to(tl.float32)[None, :]
    row = states + slot * (heads + 2 * kv_heads) * size
    member = tl.arange(0, HEADS)
    live = member < GROUP
    left, right = _turned(row + (head * GROUP + member) * size, cos, sin, query_norm, eps, live, HALF, NORM)
    left, right = left.to(dtype), right.to(dtype)
    place = (slot * kv_heads + head) * length
    key_at, value_at = keys + place * size, values + place * size
    one = tl.arange(0, 1)
    new_left, new_right = _turned(
        row + (heads + head + one) * size, cos, sin, key_norm, eps, one == 0, HALF, NORM
    )
    new_left, new_right = new_left.to(dtype), new_right.to(dtype)
    value = row + (heads + kv_heads + head) * size
    first_value, second_value = tl.load(value + half), tl.load(value + HALF + half)

    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    first, second = tl.zeros((HEADS, HALF), tl.float32), tl.zeros((HEADS, HALF), tl.float32)
    if part == 0:
        at = position * size + half
        tl.store(key_at + at[None, :], new_left)
        tl.store(key_at + HALF + at[None, :], new_right)
        tl.store(value_at + at, first_value)
        tl.store(value_at + HALF + at, second_value)
        highest = tl.sum(
            left.to(tl.float32) * new_left.to(tl.float32) + right.to(tl.float32) * new_right.to(tl.float32), axis=1
        ) * scaling  # fmt: skip
        total += 1.0
        first += first_value.to(tl.float32)[None, :]
        second += second_value.to(tl.float32)[None, :]

    share = tl.cdiv(tl.cdiv(position, TOKENS), SPLIT) * TOKENS
    begin = part * share
    for start in range(begin, tl.minimum(begin + share, position), TOKENS):
        token = start + tl.arange(0, TOKENS)
        seen = token < position
        at = token[:, None] * size + half[None, :]
        scores = tl.dot(
            left, tl.trans(tl.load(key_at + at, mask=seen[:, None], other=0.0)), input_precision="ieee"
        )
        scores = tl.dot(
            right,
            tl.trans(tl.load(key_at + HALF + at, mask=seen[:, None], other=0.0)),
            scores,
            input_precision="ieee",
        )
        scores = tl.where(seen[None, :], scores * scaling, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(dtype)
        first = tl.dot(
            weights, tl.load(value_at + at, mask=seen[:, None], other=0.0), first * shrink[:, None],
            input_precision="ieee",
        )  # fmt: skip
        second = tl.dot(
            weights, tl.load(value_at + HALF + at, mask=seen[:, None], other=0.0), second * shrink[:, None],
            input_precision="ieee",
        )  # fmt: skip
        highest = higher

    last = True
    if SPLIT > 1:
        kept: tl.constexpr = HEADS * (size + 2)
        number = slot * kv_heads + head
        base = parts + number * SPLIT * kept
        own = base + part * kept
        at = 2 * HEADS + member[:, None] * size + half[None, :]
        tl.store(own + member, highest)
        tl.store(own + HEADS + member, total)
        tl.store(own + at, first)
        tl.store(own + at + HALF, second)
        tl.debug_barrier()  # all threads' stores are before the count
        last = tl.atomic_add(arrived + number, 1, sem="acq_rel") == SPLIT - 1
        if last:
            highest = tl.full((HEADS,), float("-inf"), tl.float32)
            total = tl.zeros((HEADS,), tl.float32)
            first, second = tl.zeros_like(first), tl.zeros_like(second)
            for each in range(SPLIT):
                its = base + each * kept
                peak = tl.load(its + member, cache_modifier=".cg")
                higher = tl.maximum(highest, peak)
                shrink, grow = tl.exp(highest - higher), tl.exp(peak - higher)
                total = total * shrink + tl.load(its + HEADS + member, cache_modifier=".cg") * grow
                first = first * shrink[:, None] + tl.load(its + at, cache_modifier=".cg") * grow[:, None]
                second = (
                    second * shrink[:, None] + tl.load(its + at + HALF, cache_modifier=".cg") * grow[:, None]
                )
                highest = higher
            tl.store(arrived + number, 0)
    if last:
        at = out + (slot * heads + head * GROUP + member[:, None]) * size + half[None, :]
        tl.store(at, (first / total[:, None]).to(dtype), mask=live[:, None])
        tl.store(at + HALF, (second / total[:, None]).to(dtype), mask=live[:, None])
