"""bitsandbytes' packed NF4 read in place by one Triton kernel, double quantization undone in the same pass.

bitsandbytes launches three for it: the scales' codes, their offset, the weights' codes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["dequantize_nf4"]

_BYTES = 1024


def dequantize_nf4(codes: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
    """The weight that packed codes stand for, ``[out, in]`` in the dtype of ``state``; the bits of bitsandbytes' own.

    Args:
        codes: uint8, two codes a byte, the first in the high bits.
        state: bitsandbytes' ``QuantState`` of NF4 in blocks of 64, double-quantized or not.
        out: written to, where it is given.
    """
    if out is None:
        out = torch.empty(state.shape, dtype=state.dtype, device=codes.device)
    nested = state.state2 is not None
    inner = state.state2 if nested else state
    count = out.numel() // 2
    _dequantize[(triton.cdiv(count, _BYTES),)](
        codes, state.absmax, inner.absmax, inner.code, state.offset if nested else inner.code, state.code, out,
        count, nested, _BYTES,
    )  # fmt: skip
    return out


@triton.jit
def _dequantize(
    codes, scales, ranges, levels, offset, values, out, count, nested: tl.constexpr, width: tl.constexpr
):
    at = tl.program_id(0) * width + tl.arange(0, width)
    inside = at < count
    packed = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    block = at // 32
    if nested:
        level = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
        span = tl.load(ranges + block // 256, mask=inside, other=0.0)
        scale = tl.load(levels + level) * span + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    first = tl.load(values + (packed >> 4)) * scale
    second = tl.load(values + (packed & 15)) * scale
    pair = tl.interleave(first, second).to(out.dtype.element_ty)
    place = tl.program_id(0) * 2 * width + tl.arange(0, 2 * width)
    tl.store(out + place, pair, mask=place < 2 * count)
