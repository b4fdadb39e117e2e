"""The numbers of a program on a GPU: three blocks of memory, and weights as the tensor cores read them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DeviceBlocks", "digits", "padded", "power_of_two", "spread"]

Array = NDArray[Any]
_ALIGNMENT = 16  # entries: what the compiler needs to know for wide loads


class DeviceBlocks:
    """Constants by kind: float32, int32 and int8."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {"float32": [], "int32": [], "int8": []}

    def add(self, values: Array) -> int:
        """Appends the numbers, flattened; the index of the first one in the block of their dtype."""
        parts = self._parts[values.dtype.name]
        start = sum(part.size for part in parts)
        parts.append(padded(values.ravel(), _ALIGNMENT))
        return start

    def arrays(self) -> tuple[Array, Array, Array]:
        """float32, int32 and int8, none of them empty."""
        blocks = ((name, [*parts, np.zeros(_ALIGNMENT, name)]) for name, parts in self._parts.items())
        floats, ints, codes = (np.concatenate(parts).astype(name) for name, parts in blocks)
        return floats, ints, codes


def power_of_two(size: int, least: int = 32) -> int:
    """The next one from ``size`` on; blocks in registers have such sizes."""
    return max(least, 1 << (size - 1).bit_length())


def padded(values: Array, multiple: int) -> Array:
    """With zeros after the last axis, up to a multiple."""
    room = -values.shape[-1] % multiple
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, room)])


def spread(values: Array, group: int, span: int) -> Array:
    """``[rows, columns]`` with each group of columns padded to a span of its own: ``[rows, groups * span]``."""
    starts = range(0, values.shape[1], group)
    parts = [values[:, i : i + group] for i in starts]
    return np.concatenate([np.pad(x, ((0, 0), (0, span - x.shape[1]))) for x in parts], axis=1)


def digits(values: Array) -> Array:
    """int8 ``[planes, ...]``: integers to the base 256 with digits from -128 to 127, the lowest first."""
    planes: list[Array] = []
    rest = values.astype(np.int64)
    while not planes or rest.any():
        low = ((rest + 128) & 255) - 128
        planes.append(low.astype(np.int8))
        rest = (rest - low) >> 8
    return np.stack(planes)
