"""The constants of a program in C: as literals of a source, or in one block of memory beside it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.c_helpers import hexadecimal

__all__ = ["Block", "Constants", "Literals", "interleave", "steps_per_unit"]

Array = NDArray[Any]
_TYPES = {
    "int8": "int8_t",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "int32": "int32_t",
    "int64": "int64_t",
} | {"float32": "float"}
ALIGNMENT = 64


class Constants(Protocol):
    """Where the generated code finds its numbers."""

    def array(self, name: str, values: Array) -> str:
        """A C expression, a pointer to ``values``, flattened."""

    def number(self, name: str, value: float) -> str:
        """A C expression of one float32."""


class Literals:
    """Constants written into the source: one program, one source."""

    def __init__(self) -> None:
        self.definitions: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def array(self, name: str, values: Array) -> str:
        """Defines ``static const`` numbers."""
        flat = values.ravel()
        kind = _TYPES[flat.dtype.name]
        words = [_float(x) for x in flat.tolist()] if kind == "float" else [str(x) for x in flat.tolist()]
        lines = "\n".join("    " + ", ".join(words[i : i + 12]) + "," for i in range(0, len(words), 12))
        self.definitions[name] = f"static const {kind} {name}[{len(words)}] = {{\n{lines}\n}};"
        self.sizes[name] = flat.nbytes
        return name

    def number(self, name: str, value: float) -> str:
        """The literal."""
        return _float(value) if np.isinf(value) else hexadecimal(value)


class Block:
    """Constants in one block of memory: programs of the same shape share a source, and so a library."""

    def __init__(self) -> None:
        self._parts: list[Array] = []
        self._size = 0

    def array(self, name: str, values: Array) -> str:
        """Appends the numbers at a multiple of 64 bytes."""
        flat = np.ascontiguousarray(values).ravel()
        start = self._size
        padding = -flat.nbytes % ALIGNMENT
        self._parts += [flat.view(np.uint8), np.zeros(padding, np.uint8)]
        self._size += flat.nbytes + padding
        return f"((const {_TYPES[flat.dtype.name]} *)(constants + {start}))"

    def number(self, name: str, value: float) -> str:
        """Appends one number."""
        return f"{self.array(name, np.array([value], np.float32))}[0]"

    def memory(self) -> Array:
        """uint8, aligned, with a margin that reads past the last weights may touch."""
        room = np.zeros(self._size + 2 * ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        block = room[start : start + self._size + ALIGNMENT]
        if self._parts:
            np.concatenate(self._parts, out=block[: self._size])
        return block


def _float(value: float) -> str:
    if np.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{np.float32(value)!s}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def steps_per_unit(bits: int) -> int:
    """Steps of 4 columns that fill whole bytes in the narrowest bit plane (4, 2 or 1 wide) of a code."""
    return 1 if bits == 8 else 8 if bits & 1 else 4 if bits & 2 else 2


def interleave(values: Array, bits: int, group: int) -> Array:
    """The weight matrix as ``kernels/vector.h`` reads it.

    Args:
        values: int32 or float32 ``[rows, columns]``.
        bits: 2 to 8, or 32 for float32.
        group: columns of a group of scales; each begins with a new unit.

    Returns:
        uint8: blocks of 16 rows, the last one of what is left; float32 ``[columns][16]`` in a block, or units of
        packed ``[16][4]`` codes.
    """
    whole = len(values) // 16 * 16
    parts = [(values[:whole], 16), (values[whole:], len(values) - whole)]
    return np.concatenate([_interleaved(part, rows, bits, group) for part, rows in parts if len(part)])


def _interleaved(values: Array, rows: int, bits: int, group: int) -> Array:
    """Blocks of ``rows`` rows."""
    columns = values.shape[1]
    blocks = values.reshape(-1, rows, columns)
    if bits == 32:
        return np.ascontiguousarray(blocks.transpose(0, 2, 1), np.float32).view(np.uint8).ravel()
    span = 4 * steps_per_unit(bits)
    parts = [_padded(blocks[:, :, i : i + group], span) for i in range(0, columns, group)]
    units = np.concatenate(parts, axis=2).reshape(len(blocks), rows, -1, span // 4, 4)
    # [blocks, units, steps, rows, 4]
    codes = (units.transpose(0, 2, 3, 1, 4) & (2**bits - 1)).astype(np.uint8)
    lanes = codes.reshape(len(blocks), -1, span // 4, 4 * rows)
    return np.concatenate(_planes(lanes, bits), axis=2).ravel()


def _padded(part: Array, span: int) -> Array:
    return np.pad(part, ((0, 0), (0, 0), (0, -part.shape[2] % span)))


def _planes(codes: Array, bits: int) -> list[Array]:
    """uint8 ``[blocks, units, bytes]`` for each plane of codes ``[blocks, units, steps, lane]``."""
    if bits == 8:
        return [codes.reshape(*codes.shape[:2], -1)]
    planes, done = [], 0
    for width in (4, 2, 1):
        if bits & width:
            pieces = (codes >> done) & (2**width - 1)
            fields = pieces.reshape(*codes.shape[:2], -1, 8 // width, codes.shape[3])
            shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
            planes.append((fields << shifts).sum(axis=3, dtype=np.uint8).reshape(*codes.shape[:2], -1))
            done += width
    return planes
