"""Double quantization: the scales of small groups are themselves stored in 8 bits.

Dettmers et al. 2023 (QLoRA, arXiv:2305.14314, section 3): the scales' mean is taken off, and blocks of 256 of
them share a float32 range in which each is one of 256 values, spaced ever closer towards zero (dynamic tree
quantization, Dettmers et al. 2022, arXiv:2110.02861). Groups of 64 then take 0.127 bits a weight for scales
instead of 0.5. The numbers are bitsandbytes'.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["BLOCK", "double_dequantize", "double_quantize"]

BLOCK = 256
_EXPONENTS = 7


def double_quantize(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[n]``, ranges float32 ``[ceil(n / 256)]`` and offset float32 ``[]`` of scales of any shape."""
    flat = scale.to(torch.float32).reshape(-1)
    offset = flat.mean()
    blocks = _blocks(flat - offset)
    ranges = blocks.abs().amax(dim=1)
    inside = blocks / ranges.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(inside, _boundaries(scale.device)).to(torch.uint8)
    return codes.reshape(-1)[: flat.numel()].contiguous(), ranges, offset


def double_dequantize(codes: Tensor, ranges: Tensor, offset: Tensor) -> Tensor:
    """The scales, float32 ``[n]``."""
    values = _blocks(_values(codes.device)[codes.long()])
    return (values * ranges[:, None]).reshape(-1)[: codes.numel()] + offset


def _blocks(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


@cache
def _values(device: torch.device) -> Tensor:
    """Ascending, float32 ``[256]``: 2**i values in each decade, from 1e-6 up, of both signs; zero, and one."""
    positive: list[float] = []
    for i in range(_EXPONENTS):
        boundaries = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        positive += (10 ** (i - _EXPONENTS + 1) * means).tolist()
    return torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), device=device)


@cache
def _boundaries(device: torch.device) -> Tensor:
    """Between neighbours, float32 ``[255]``."""
    values = _values(device)
    return (values[1:] + values[:-1]) / 2
