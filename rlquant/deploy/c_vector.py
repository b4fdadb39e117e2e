"""Matrix products as calls of ``kernels/vector.h``, their weights laid out for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.c_constants import Constants, interleave
from rlquant.deploy.c_floats import FloatNumbers, grid_lines
from rlquant.deploy.c_memory import MARGIN, c_type
from rlquant.deploy.c_plain import PlainProducts, patch_lines, patch_members
from rlquant.deploy.c_source import indented
from rlquant.deploy.program import Conv2d, Linear, Program

__all__ = ["VectorProducts"]

_MOST_TOGETHER = 4  # patches that a tile multiplies at once, on any machine


class VectorProducts:
    """Writes products; see :class:`~rlquant.deploy.c_source.Products`.

    Weights of more than 8 bits and convolutions in blocks (PyTorch's groups) are left to plain loops.
    """

    def __init__(self, program: Program, constants: Constants) -> None:
        self._program = program
        self._constants = constants
        self._plain = PlainProducts(program, constants, FloatNumbers(program, constants))
        ours = [op for op in program.ops if isinstance(op, Linear) and _fits(op)]
        wide = [op for op in ours if 8 < program.buffers[op.source].bits < 32]
        rows = max((_together(op) * _whole(op.weight.rows) for op in ours), default=16)
        halves = max((_together(op) * op.weight.columns for op in wide), default=0) + MARGIN
        self.members = [
            f"float result[{rows}]",
            f"uint8_t lower[{halves}], upper[{halves}]",
            *patch_members(program, _MOST_TOGETHER, MARGIN),
        ]

    def lines(self, op: Linear, name: str) -> list[str]:
        """Statements that read ``x`` and write ``y``."""
        if not _fits(op):
            return self._plain.lines(op, name)
        target = self._program.buffers[op.target]
        start = [] if target.is_float else grid_lines(op, name, self._constants)
        if not isinstance(op, Conv2d):
            call = self._call(op, name, "x", "1")
            return [*start, *call, "int i;", *self._store(op, "i", "memory->result")]
        return [*start, *self._convolution(op, name)]

    def _convolution(self, op: Conv2d, name: str) -> list[str]:
        """Tiles of some positions: their patches, the product, and the rows of results put in place."""
        source = self._program.buffers[op.source]
        kind, rows, positions = c_type(source), op.weight.rows, op.out_size[0] * op.out_size[1]
        # Unpacking for floats fills the registers (and the compiler's time) with one position already.
        tile = "1" if source.is_float and op.weight.bits < 32 else "TILE"
        return [
            "int at, p, i;",
            f"for (at = 0; at < {positions}; at += {tile}) {{",
            *indented(
                [
                    f"const int count = {positions} - at < {tile} ? {positions} - at : {tile};",
                    "for (p = 0; p < count; ++p) {",
                    f"    {kind} *restrict patch = memory->patch_{kind} + p * {op.weight.columns};",
                    *indented(patch_lines(op, "0", "(at + p)")),
                    "}",
                    *self._call(op, name, f"memory->patch_{kind}", tile),
                    "for (p = 0; p < count; ++p) {",
                    *indented(
                        self._store(op, f"i * {positions} + at + p", f"(memory->result + p * {_whole(rows)})")
                    ),
                    "}",
                ]
            ),
            "}",
        ]

    def _store(self, op: Linear, index: str, result: str) -> list[str]:
        target = self._program.buffers[op.target]
        value = f"{result}[i]"
        if not target.is_float:
            value = f"round_even(clampf({value}, low, high)) + zero"
        return [f"for (i = 0; i < {op.weight.rows}; ++i) {{", f"    y[{index}] = {value};", "}"]

    def _call(self, op: Linear, name: str, x: str, many: str) -> list[str]:
        weight, columns, constants = op.weight, op.weight.columns, self._constants
        source = self._program.buffers[op.source]
        w = constants.array(f"weight{name}", interleave(weight.values, weight.bits, op.group))
        gain, bias = (
            constants.array(f"{part}{name}", _by_block(getattr(op, part))) for part in ("gain", "bias")
        )
        shape = f"{many}, {weight.rows}, {weight.bits}, {columns}, {op.group}"
        result = f"memory->result, {_whole(weight.rows)}"
        if source.is_float:
            return [f"float_product({shape}, {x}, {columns}, {w}, {gain}, {bias}, {result});"]
        corrections = "0"
        if op.source_zero:
            corrections = constants.array(f"correction{name}", _by_block(op.corrections))
        rest = f"{columns}, {w}, {corrections}, {gain}, {bias}, {result}"
        if source.bits <= 8:
            return [f"integer_product({shape}, {x}, 0, {rest});"]
        return [
            "int half;",
            f"for (half = 0; half < {many} * {columns}; ++half) {{",
            f"    memory->lower[half] = (uint8_t){x}[half];",
            f"    memory->upper[half] = (uint8_t)({x}[half] >> 8);",
            "}",
            f"integer_product({shape}, memory->lower, memory->upper, {rest});",
        ]


def _fits(op: Linear) -> bool:
    blocks = op.blocks if isinstance(op, Conv2d) else 1
    return blocks == 1 and (op.weight.bits <= 8 or op.weight.bits == 32)


def _together(op: Linear) -> int:
    """Rows of activations that are multiplied at once, at most."""
    return _MOST_TOGETHER if isinstance(op, Conv2d) else 1


def _whole(rows: int) -> int:
    """Rows in whole blocks."""
    return -(-rows // 16) * 16


def _by_block(values: NDArray[Any]) -> NDArray[Any]:
    """``[rows]`` or ``[rows, groups]`` as ``[blocks, groups, 16]``, padded with zeros."""
    matrix = values.reshape(len(values), -1)
    padded = np.zeros((_whole(len(matrix)), matrix.shape[1]), matrix.dtype)
    padded[: len(matrix)] = matrix
    return np.ascontiguousarray(padded.reshape(-1, 16, matrix.shape[1]).transpose(0, 2, 1))
