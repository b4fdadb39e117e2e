"""Which device can run kernels."""

from __future__ import annotations

import importlib.util
import os

import torch

from rlquant.errors import InputError

__all__ = ["check_device", "is_interpreted"]

_OTHERS = "runtimes that can: native, onnx, reference"


def is_interpreted() -> bool:
    """Whether Triton's interpreter takes the place of its compiler: the environment variable TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def check_device(device: torch.device) -> None:
    """Whether kernels can run on a device.

    Raises:
        InputError: no Triton, no such device, or Triton's interpreter where a GPU was asked for.
    """
    if importlib.util.find_spec("triton") is None:
        raise InputError(f'the runtime cuda needs Triton: pip install "rlquant[gpu]"; {_OTHERS}')
    if device.type == "cpu":
        if not is_interpreted():
            raise InputError(
                f"the runtime cuda runs on the CPU in Triton's interpreter alone: set TRITON_INTERPRET=1; {_OTHERS}"
            )
    elif device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no CUDA device {str(device)!r}: torch sees {torch.cuda.device_count()}; {_OTHERS}")
    elif is_interpreted():
        raise InputError(
            f"TRITON_INTERPRET is set, so no kernel reaches the CUDA device: unset it; {_OTHERS}"
        )
