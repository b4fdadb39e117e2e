"""Which devices there are, and what compiles for them."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Any

from rlquant.errors import InputError, unknown_name

__all__ = ["device_named", "free_bytes", "has_triton"]


@cache
def has_triton() -> bool:
    """Whether Triton is installed, which comes with torch for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None


def free_bytes(device: Any) -> int | None:
    """Memory of a CUDA device that this process can still have; None for another device.

    What torch holds unused counts as free, and a cap on this process (``set_per_process_memory_fraction``) as the end.
    """
    import torch

    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    capped = int(torch.cuda.get_per_process_memory_fraction(device) * total) - reserved
    return max(0, min(free, capped)) + reserved - torch.cuda.memory_allocated(device)


def device_named(name: str, *, also: tuple[str, ...] = ()) -> str:
    """A device that torch has; ``also`` are other names to list. Raises InputError for any other."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise unknown_name("device", name, (*also, "cpu", "cuda", "cuda:0"))
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise InputError(
                f"the device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices"
            )
    return name
