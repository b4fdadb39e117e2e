"""What generated Triton kernels call, and the two kernels around a program: one for batches, one for single requests.

Numbers of a program's buffers, in registers as in memory: a grid of up to 8 bits is int8, ``q - 128``; all else is
float32, finer grids too. Nothing here may be contracted to a fused multiply-add: launch with
``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlquant.deploy.cuda_device import is_interpreted
from rlquant.deploy.head import TANH_DENOMINATOR, TANH_LIMIT, TANH_NUMERATOR

INTERPRETED = tl.constexpr(is_interpreted())
_LIMIT = tl.constexpr(float(TANH_LIMIT))
_N0, _N1, _N2, _N3, _N4, _N5, _N6 = (tl.constexpr(float(x)) for x in TANH_NUMERATOR)
_D0, _D1, _D2, _D3 = (tl.constexpr(float(x)) for x in TANH_DENOMINATOR)

ACT, FRESH, LEAVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a request asks for: an action, an action of a new episode, or that the kernel ends."""


# --- numbers


@triton.jit
def clamp(x, low, high):
    """``x`` between ``low`` and ``high``; a zero keeps its sign."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def limited(x, low, high):
    """:func:`clamp` for what becomes an integer, which has no sign of zero."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def real(x):
    """float32 of a buffer's numbers."""
    if x.dtype == tl.int8:
        x = x.to(tl.float32) + 128.0
    return x


@triton.jit
def narrow_grid(y, zero):
    """``rint(y) + zero`` of numbers below 2**22 as int8, less 128: the low bits of a float32 near 1.5 * 2**23."""
    return ((y + 12582912.0).to(tl.int32, bitcast=True) + (zero - 128)).to(tl.int8)


@triton.jit
def wide_grid(y, zero):
    """``rint(y) + zero`` of numbers below 2**22 as float32; half to even."""
    return ((y + 12582912.0) - 12582912.0) + zero


@triton.jit
def tanh32(x):
    """See :func:`rlquant.deploy.head.tanh32`."""
    x = clamp(x, -_LIMIT, _LIMIT)
    square = x * x
    above = _N0 * square + _N1
    above = above * square + _N2
    above = above * square + _N3
    above = above * square + _N4
    above = above * square + _N5
    above = above * square + _N6
    below = _D0 * square + _D1
    below = below * square + _D2
    below = below * square + _D3
    return tl.div_rn(above * x, below)


@triton.jit
def sigmoid32(x):
    """See :func:`rlquant.deploy.head.sigmoid32`."""
    return 0.5 * tanh32(0.5 * x) + 0.5


# --- activations on floats, named as in C


@triton.jit
def relu(x):
    """ReLU."""
    return tl.where(x > 0.0, x, 0.0)


@triton.jit
def relu6(x):
    """ReLU6."""
    return clamp(x, 0.0, 6.0)


@triton.jit
def leaky_relu(x):
    """LeakyReLU, slope 0.01."""
    return tl.where(x > 0.0, x, 0.01 * x)


@triton.jit
def sigmoid(x):
    """Sigmoid."""
    return tl.div_rn(1.0 + tl.zeros_like(x), 1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    """SiLU."""
    return x * sigmoid(x)


@triton.jit
def elu(x):
    """ELU."""
    return tl.where(x > 0.0, x, tl.exp(tl.where(x > 0.0, 0.0, x)) - 1.0)


@triton.jit
def selu(x):
    """SELU."""
    return 1.0507009873554805 * tl.where(x > 0.0, x, 1.6732632423543772 * elu(x))


@triton.jit
def gelu(x):
    """GELU, by erf."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def softplus(x):
    """Softplus."""
    return relu(x) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def mish(x):
    """Mish."""
    return x * tanh32(softplus(x))


@triton.jit
def softsign(x):
    """Softsign."""
    return tl.div_rn(x, 1.0 + tl.abs(x))


@triton.jit
def hardswish(x):
    """Hardswish."""
    return x * clamp(x + 3.0, 0.0, 6.0) / 6.0


# --- products


@triton.jit
def plane(x, number: tl.constexpr, planes: tl.constexpr):
    """Byte ``number`` of a grid's integers, less 128, as int8."""
    if planes > 1:
        x = (((x.to(tl.int32) >> (8 * number)) & 255) - 128).to(tl.int8)
    return x


@triton.jit
def packed(x):
    """int8 ``[1, k]`` as int32 ``[k / 4]``, the first byte lowest."""
    bytes_of = tl.reshape(x, [x.shape[1] // 4, 4]).to(tl.int32) & 255
    return tl.sum(bytes_of << (8 * tl.arange(0, 4))[None, :], axis=1)


@triton.jit
def dot_of_bytes(x, y):
    """Sum of the products of four signed bytes, for each pair of int32."""
    if INTERPRETED:
        total = (x << 24 >> 24) * (y << 24 >> 24) + (x << 16 >> 24) * (y << 16 >> 24)
        total += (x << 8 >> 24) * (y << 8 >> 24) + (x >> 24) * (y >> 24)
    else:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1
        )
    return total


@triton.jit
def weights(codes, units, first, span, size: tl.constexpr, rows: tl.constexpr):
    """Columns ``first`` to ``first + size`` of the int8 weights ``[units][span]``, as :func:`product` takes them.

    For one row int32 ``[units, size / 4]``, four columns in one number; for more int8 ``[size, units]``.
    """
    if rows == 1:
        words = codes.to(tl.pointer_type(tl.int32)) + (first // 4 + tl.arange(0, size // 4))[None, :]
        w = tl.load(words + units[:, None] * (span // 4))
    else:
        w = tl.load(codes + units[None, :] * span + (first + tl.arange(0, size))[:, None])
    return w


@triton.jit
def product(x, w):
    """int32 ``[rows, units]`` of int8 ``x [rows, size]`` and :func:`weights`.

    Many rows go through the tensor cores, one row through four products at a time.
    """
    if x.shape[0] == 1:
        sums = tl.sum(dot_of_bytes(w, packed(x)[None, :]), axis=1)[None, :]
    else:
        sums = tl.dot(x, w, out_dtype=tl.int32)
    return sums


@triton.jit
def accumulate(acc, x, codes, units, first, span, plane_size, sources: tl.constexpr, digits: tl.constexpr):
    """Adds the product of ``x [rows, size]`` and some weights to int32 ``acc [rows, units]``.

    Takes one product for each pair of bytes. ``codes`` are int8 ``[digits][units][span]``: digits of the weights to
    the base 256, from the lowest on.
    """
    for j in tl.static_range(digits):
        w = weights(codes + j * plane_size, units, first, span, x.shape[1], x.shape[0])
        for i in tl.static_range(sources):
            part = product(plane(x, i, sources), w)
            acc += part << (8 * (i + j)) if i + j > 0 else part
    return acc


@triton.jit
def accumulate_floats(acc, x, weights, units, first, span):
    """Adds ``x [rows, k] @ weights [k, units]`` to float32 ``acc``."""
    k = first + tl.arange(0, x.shape[1])
    if x.shape[0] == 1:
        acc += tl.sum(tl.load(weights + units[:, None] * span + k[None, :]) * x, axis=1)[None, :]
    else:
        w = tl.load(weights + units[None, :] * span + k[:, None])
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


# --- what comes out


@triton.jit
def put(results, at, numbers, mask, tag, pairs: tl.constexpr):
    """Stores 32-bit words; as ``pairs``, int64 of which the upper half is ``tag``."""
    words = numbers.to(tl.int32, bitcast=True) if numbers.dtype == tl.float32 else numbers.to(tl.int32)
    if pairs:
        word = (words.to(tl.int64) & 0xFFFFFFFF) | (tag.to(tl.int64) << 32)
        tl.store(results + at, word, mask=mask, cache_modifier=".wt")
    else:
        tl.store(results + at, words, mask=mask)


@triton.jit
def choice(y, columns, first: tl.constexpr, last: tl.constexpr):
    """Index, from ``first`` on, of the largest of ``y [rows, columns]`` between the two: int32 ``[rows, 1]``."""
    inside = (columns >= first) & (columns < last)
    best = tl.argmax(tl.where(inside[None, :], y, float("-inf")), axis=1)
    return tl.maximum(best - first, 0)[:, None]


# --- kernels


@triton.jit
def batch(
    observations, states, results, floats, ints, codes, wide, narrow, n,
    rows: tl.constexpr, hold: tl.constexpr, compute: tl.constexpr,
):  # fmt: skip
    """Runs ``compute`` on ``n`` observations, ``rows`` at a time; ``hold`` loads weights before."""
    tag = n * 0
    held = hold(codes, rows)
    for tile in range(tl.program_id(0), tl.cdiv(n, rows), tl.num_programs(0)):
        compute(
            observations, states, results, tag, held, floats, ints, codes, wide, narrow, tile * rows, n, rows, False
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def receive(inbox, observations, tag, patience, size: tl.constexpr, block: tl.constexpr):
    """Waits for request ``tag``: pairs of a 32-bit word and a tag, first the command, then the observation.

    Returns the command, or LEAVE after ``patience`` looks at an inbox that holds no whole request.
    """
    command = tag * 0
    waiting = tag * 0 + patience
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        pairs = tl.load(inbox + at, mask=at < size, other=0, volatile=True)
        missing = tl.max(((at < size) & ((pairs >> 32).to(tl.int32) != tag)).to(tl.int32), axis=0)
        while (missing > 0) & (waiting > 0):
            waiting -= 1
            pairs = tl.load(inbox + at, mask=at < size, other=0, volatile=True)
            missing = tl.max(((at < size) & ((pairs >> 32).to(tl.int32) != tag)).to(tl.int32), axis=0)
        words = pairs.to(tl.int32)
        tl.store(observations - 1 + at, words.to(tl.float32, bitcast=True), mask=(at < size) & (at > 0))
        command |= tl.sum(tl.where(at == 0, words, 0), axis=0) | missing * LEAVE
    return command


@triton.jit
def serve(
    inbox, outbox, served, observations, states, floats, ints, codes, wide, narrow, patience, requests,
    size: tl.constexpr, block: tl.constexpr, remembered: tl.constexpr, answer: tl.constexpr,
    hold: tl.constexpr, compute: tl.constexpr,
):  # fmt: skip
    """Answers up to ``requests`` requests, then leaves word in ``outbox[answer]``; all of one program.

    ``inbox`` and ``outbox`` lie in host memory, the rest in the device's. A word and its tag are one 64-bit
    access, so neither side needs a fence, and a request or an answer costs one way over the bus.
    """
    held = hold(codes, 1)
    first = tl.load(served)
    tag = first
    command = tag * 0
    while (command < LEAVE) & (tag - first != requests):
        command = receive(inbox, observations, tag + 1, patience, size, block)
        if command < LEAVE:
            tag += 1
            if command == FRESH:
                for start in range(0, remembered, block):
                    at = start + tl.arange(0, block)
                    tl.store(states + at, tl.zeros([block], tl.float32), mask=at < remembered)
            tl.debug_barrier()
            compute(
                observations, states, outbox, tag, held, floats, ints, codes, wide, narrow, tag * 0, 1, 1, True
            )  # fmt: skip
            tl.debug_barrier()
    tl.store(served, tag)
    tl.store(outbox + answer, tag.to(tl.int64) * 0 + 1, cache_modifier=".wt")
