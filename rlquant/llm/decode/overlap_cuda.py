"""Kernels of a step begin while the one before them ends: programmatic dependent launch, on Hopper and later.

A step is a chain of a hundred short kernels, and between two of them a GPU idles for as long as some of them take. Here
the next one starts as soon as there is room, reads what no kernel of a step writes, such as weights, and waits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # before Triton 3.5
    gdc_launch_dependents = gdc_wait = None

__all__ = ["await_previous", "has_ptx", "overlap"]

_HOPPER = 9


def has_ptx(device: torch.device) -> bool:
    """Whether kernels there may hold NVIDIA's instructions: not in Triton's interpreter, and not for ROCm."""
    return device.type == "cuda" and torch.version.hip is None


def overlap(device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel call on a device."""
    if gdc_wait is not None and has_ptx(device) and torch.cuda.get_device_capability(device)[0] >= _HOPPER:
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Let the next kernel start, and wait for all memory of the one before: both in this order, so in chains too."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
