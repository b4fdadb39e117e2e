"""Attention of a decode step as one Triton kernel: rotary positions, the cache's new entry, grouped-query attention.

A program reads the cached tokens of one sequence and one key-value head, for all query heads of its group at once; long
sequences are split over several programs, whose results the last one joins in their order (Flash-Decoding, Dao et al.
2023). The new token's key and value go into the cache, and are attended to from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlquant.llm.decode.overlap_cuda import await_previous

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
def _read(
    base, scales, token, seen, dtype: tl.constexpr, SIDE: tl.constexpr, HALF: tl.constexpr, KIND: tl.constexpr
):
    """Half of the vectors of cached tokens, ``[tokens, HALF]``; see ``cache.py`` for what is stored."""
    half = tl.arange(0, HALF)
    if KIND == 3:
        stored = tl.load(base + token[:, None] * HALF + half[None, :], mask=seen[:, None], other=0)
        stored = (stored >> (4 * SIDE)) & 15
    else:
        at = token[:, None] * (2 * HALF) + SIDE * HALF + half[None, :]
        stored = tl.load(base + at, mask=seen[:, None], other=0.0)
    if KIND == 0:
        values = stored
    else:
        scale = tl.load(scales + token * 4 + 2 * SIDE, mask=seen, other=0.0).to(tl.float32)[:, None]
        offset = tl.load(scales + token * 4 + 2 * SIDE + 1, mask=seen, other=0.0).to(tl.float32)[:, None]
        values = (stored.to(tl.float32) * scale + offset).to(dtype)
    return values


@triton.jit
def _codes(x, scales, KIND: tl.constexpr):
    """Codes of half a vector, ``[1, HALF]``, whose scale and offset are stored."""
    x = x.to(tl.float32)
    if KIND == 1:
        scale = tl.maximum(tl.max(tl.abs(x)) / 448.0, 6.103515625e-05).to(tl.float16)
        offset = (scale * 0.0).to(tl.float16)
        codes = tl.minimum(tl.maximum(x / scale.to(tl.float32), -448.0), 448.0).to(tl.float8e4nv)
    else:
        levels: tl.constexpr = 255.0 if KIND == 2 else 15.0
        offset = tl.min(x).to(tl.float16)
        scale = tl.maximum((tl.max(x) - offset.to(tl.float32)) / levels, 6.103515625e-05).to(tl.float16)
        steps = tl.floor((x - offset.to(tl.float32)) / scale.to(tl.float32) + 0.5)
        codes = tl.minimum(tl.maximum(steps, 0.0), levels).to(tl.uint8)
    tl.store(scales, scale)
    tl.store(scales + 1, offset)
    return codes


@triton.jit
def _write(base, scales, position, left, right, HALF: tl.constexpr, KIND: tl.constexpr):
    """Both halves of a token's vector, ``[1, HALF]`` each."""
    half = tl.arange(0, HALF)[None, :]
    at = base + position * (2 * HALF) + half
    if KIND == 0:
        tl.store(at, left)
        tl.store(at + HALF, right)
    else:
        first = _codes(left, scales + position * 4, KIND)
        second = _codes(right, scales + position * 4 + 2, KIND)
        if KIND == 3:
            tl.store(base + position * HALF + half, first | (second << 4))
        else:
            tl.store(at, first)
            tl.store(at + HALF, second)


@triton.jit
def attend_kernel(
    states, positions, cosines, sines, query_norm, key_norm, keys, values, key_scales, value_scales, out,
    parts, arrived, heads, kv_heads, length, scaling, eps,
    KIND: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr,
    TOKENS: tl.constexpr, SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One key-value head of one sequence, or a part of its tokens.

    ``states``: ``[slots, (heads + 2 kv_heads) * size]``, queries, keys, values of the new tokens; ``positions``: int64
    ``[slots]``; ``cosines``, ``sines``: ``[length, size]``; ``keys``, ``values`` and their scales: a layer of
    ``cache.StaticCache``, of scheme KIND; ``out``: ``[slots, heads * size]``. ``parts`` and ``arrived`` as in
    ``linear_cuda.py``. A size is twice HALF; HEADS is GROUP, the query heads of a key-value head, filled up to 16.
    """
    slot, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    size: tl.constexpr = 2 * HALF
    dtype = states.dtype.element_ty
    await_previous(OVERLAP)
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
    stored: tl.constexpr = HALF if KIND == 3 else size
    key_at, value_at = keys + place * stored, values + place * stored
    key_scale_at, value_scale_at = key_scales + place * 4, value_scales + place * 4
    one = tl.arange(0, 1)
    new_left, new_right = _turned(
        row + (heads + head + one) * size, cos, sin, key_norm, eps, one == 0, HALF, NORM
    )
    new_left, new_right = new_left.to(dtype), new_right.to(dtype)
    value = row + (heads + kv_heads + head) * size
    first_value = tl.load(value + one[:, None] + half[None, :])
    second_value = tl.load(value + HALF + one[:, None] + half[None, :])

    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    first, second = tl.zeros((HEADS, HALF), tl.float32), tl.zeros((HEADS, HALF), tl.float32)
    if part == 0:
        _write(key_at, key_scale_at, position, new_left, new_right, HALF, KIND)
        _write(value_at, value_scale_at, position, first_value, second_value, HALF, KIND)
        highest = tl.sum(
            left.to(tl.float32) * new_left.to(tl.float32) + right.to(tl.float32) * new_right.to(tl.float32), axis=1
        ) * scaling  # fmt: skip
        total += 1.0
        first += first_value.to(tl.float32)
        second += second_value.to(tl.float32)

    share = tl.cdiv(tl.cdiv(position, TOKENS), SPLIT) * TOKENS
    begin = part * share
    for start in range(begin, tl.minimum(begin + share, position), TOKENS):
        token = start + tl.arange(0, TOKENS)
        seen = token < position
        key = _read(key_at, key_scale_at, token, seen, dtype, 0, HALF, KIND)
        scores = tl.dot(left, tl.trans(key), input_precision="ieee")
        key = _read(key_at, key_scale_at, token, seen, dtype, 1, HALF, KIND)
        scores = tl.dot(right, tl.trans(key), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scaling, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        weights = weights.to(dtype)
        kept = _read(value_at, value_scale_at, token, seen, dtype, 0, HALF, KIND)
        first = tl.dot(weights, kept, first * shrink[:, None], input_precision="ieee")
        kept = _read(value_at, value_scale_at, token, seen, dtype, 1, HALF, KIND)
        second = tl.dot(weights, kept, second * shrink[:, None], input_precision="ieee")
        highest = higher

    last = True
    if SPLIT > 1:
        width: tl.constexpr = HEADS * (size + 2)
        number = slot * kv_heads + head
        base = parts + number * SPLIT * width
        own = base + part * width
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
                its = base + each * width
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
        to = out + (slot * heads + head * GROUP + member[:, None]) * size + half[None, :]
        tl.store(to, (first / total[:, None]).to(dtype), mask=live[:, None])
        tl.store(to + HALF, (second / total[:, None]).to(dtype), mask=live[:, None])
