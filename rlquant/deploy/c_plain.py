"""Matrix products as plain C99 loops over row-major weights, packed as the artifact packs them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from rlquant.deploy.c_constants import Constants
from rlquant.deploy.c_memory import c_type
from rlquant.deploy.c_source import indented
from rlquant.deploy.program import Conv2d, Linear, Program

__all__ = ["PlainProducts", "Scaling", "patch_lines", "patch_members", "patch_sizes"]


class Scaling(Protocol):
    """From accumulators to results."""

    def limits(self, op: Linear, name: str) -> list[str]:
        """Declarations before the rows."""

    def total(self) -> str:
        """Declares the sum over groups."""

    def add(self, op: Linear, name: str, entry: str) -> list[str]:
        """Statements that add ``sum``, of one group, to ``total``; ``entry`` is the index of its gain."""

    def finish(self, op: Linear, name: str) -> list[str]:
        """Statements after the last group."""

    def value(self, op: Linear) -> str:
        """What is written."""


class PlainProducts:
    """Writes products; see :class:`~rlquant.deploy.c_source.Products`."""

    def __init__(self, program: Program, constants: Constants, scaling: Scaling) -> None:
        self._program = program
        self._constants = constants
        self._scaling = scaling
        self.members = patch_members(program, 1)

    def lines(self, op: Linear, name: str) -> list[str]:
        """Statements that read ``x`` and write ``y``."""
        source, start = self._program.buffers[op.source], self._scaling.limits(op, name)
        if not isinstance(op, Conv2d):
            start.append(f"enum {{ first = 0, last = {op.weight.rows}, at = 0, positions = 1 }};")
            return [*start, *self._rows(op, name, "x")]
        positions = op.out_size[0] * op.out_size[1]
        rows = op.weight.rows // op.blocks
        return [
            *start,
            f"enum {{ positions = {positions} }};",
            f"{c_type(source)} *patch = memory->patch_{c_type(source)};",
            "int block, at;",
            f"for (block = 0; block < {op.blocks}; ++block) for (at = 0; at < positions; ++at) {{",
            *indented(
                [
                    f"const int first = block * {rows}, last = first + {rows};",
                    *patch_lines(op, "block", "at"),
                    *self._rows(op, name, "patch"),
                ]
            ),
            "}",
        ]

    def _rows(self, op: Linear, name: str, x: str) -> list[str]:
        """Rows ``first`` to ``last`` times the numbers at ``x``."""
        columns, groups = op.weight.columns, op.gain.shape[1]
        entry = "row" if groups == 1 else f"row * {groups} + group"
        if self._program.buffers[op.source].is_float:
            start, add = "rounded sum = 0.0f;", f"sum = sum + {x}[k] * {self._weight(op, name)};"
        else:
            correct = self._constants.array(f"correction{name}", op.corrections) if op.source_zero else ""
            start = f"int32_t sum = {f'{correct}[{entry}]' if correct else '0'};"
            add = f"sum += (int32_t){x}[k] * {self._weight(op, name)};"
        end = columns if groups == 1 else f"group == {groups - 1} ? {columns} : (group + 1) * {op.group}"
        one = [
            start,
            f"const int end = {end};",
            f"int k = {'0' if groups == 1 else f'group * {op.group}'};",
            f"for (; k < end; ++k) {add}",
            *self._scaling.add(op, name, entry),
        ]
        head = "{" if groups == 1 else f"int group; for (group = 0; group < {groups}; ++group) {{"
        row = [self._scaling.total(), head, *indented(one), "}", *self._scaling.finish(op, name)]
        return [
            "int row;",
            "for (row = first; row < last; ++row) {",
            *indented([*row, f"y[row * positions + at] = {self._scaling.value(op)};"]),
            "}",
        ]

    def _weight(self, op: Linear, name: str) -> str:
        """The expression of the weight in column ``k`` of ``row``."""
        bits, index = op.weight.bits, f"row * {op.weight.columns} + k"
        if bits == 32:
            return f"{self._constants.array(f'weight{name}', op.weight.codes)}[{index}]"
        if bits == 8:
            return f"{self._constants.array(f'weight{name}', op.weight.values.astype(np.int8))}[{index}]"
        margin = np.zeros(2, np.uint8)  # a code that straddles bytes is read with the bytes after it
        packed = np.concatenate([op.weight.codes.ravel(), margin])
        code = f"code{bits}({self._constants.array(f'weight{name}', packed)}, (uint32_t)({index}))"
        return f"(float){code}" if self._program.buffers[op.source].is_float else code


def patch_sizes(program: Program) -> dict[str, int]:
    """The longest patch of each C type of source."""
    sizes: dict[str, int] = {}
    for op in program.ops:
        if isinstance(op, Conv2d):
            kind = c_type(program.buffers[op.source])
            sizes[kind] = max(sizes.get(kind, 0), op.weight.columns)
    return sizes


def patch_members(program: Program, count: int, margin: int = 0) -> list[str]:
    """Members of the memory that hold ``count`` patches, one for each type of source."""
    return [f"{kind} patch_{kind}[{count * size + margin}]" for kind, size in patch_sizes(program).items()]


def patch_lines(op: Conv2d, block: str, position: str) -> list[str]:
    """Copies what the kernel sees at one position of the result to ``patch``."""
    channels, height, width = op.image
    seen = channels // op.blocks
    place = f"(c * {height} + v) * {width} + h"
    copy = f"x[{place}]"
    if any(op.padding):
        copy = f"v < 0 || v >= {height} || h < 0 || h >= {width} ? {op.source_zero} : {copy}"
    return [
        f"const int top = {position} / {op.out_size[1]} * {op.stride[0]} - {op.padding[0]};",
        f"const int left = {position} % {op.out_size[1]} * {op.stride[1]} - {op.padding[1]};",
        f"const int start = {f'{block} * {seen}' if op.blocks > 1 else '0'};",
        "int c, i, j;",
        f"for (c = start; c < start + {seen}; ++c) for (i = 0; i < {op.kernel[0]}; ++i) {{",
        f"    const int v = top + i * {op.dilation[0]};",
        f"    for (j = 0; j < {op.kernel[1]}; ++j) {{",
        f"        const int h = left + j * {op.dilation[1]};",
        f"        patch[((c - start) * {op.kernel[0]} + i) * {op.kernel[1]} + j] = {copy};",
        "    }",
        "}",
    ]
