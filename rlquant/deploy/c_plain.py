"""Matrix products as plain C99 loops over row-major weights, packed as the artifact packs them."""

from __future__ import annotations

import numpy as np

from rlquant.deploy.c_constants import Constants
from rlquant.deploy.c_memory import c_type
from rlquant.deploy.c_source import grid_lines, indented
from rlquant.deploy.program import Buffer, Conv2d, Linear, Program

__all__ = ["PlainProducts", "patch_lines", "patch_members", "patch_sizes"]


class PlainProducts:
    """Writes products; see :class:`~rlquant.deploy.c_source.Products`."""

    def __init__(self, program: Program, constants: Constants) -> None:
        self._program = program
        self._constants = constants
        self.members = patch_members(program, 1)

    def lines(self, op: Linear, name: str) -> list[str]:
        """Statements that read ``x`` and write ``y``."""
        source, target = self._program.buffers[op.source], self._program.buffers[op.target]
        start = [] if target.is_float else grid_lines(op, name, self._constants)
        if not isinstance(op, Conv2d):
            start.append(f"enum {{ first = 0, last = {op.weight.rows}, at = 0, positions = 1 }};")
            return [*start, *self._rows(op, name, source, target, "x")]
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
                    *self._rows(op, name, source, target, "patch"),
                ]
            ),
            "}",
        ]

    def _rows(self, op: Linear, name: str, source: Buffer, target: Buffer, x: str) -> list[str]:
        """Rows ``first`` to ``last`` times the numbers at ``x``."""
        columns, groups = op.weight.columns, op.gain.shape[1]
        weight = self._weight(op, name)
        bias = self._constants.array(f"bias{name}", op.bias)
        floats = op.weight.bits == 32
        gain = "" if floats else self._constants.array(f"gain{name}", op.gain)
        entry = "row" if groups == 1 else f"(row * {groups} + group)"
        ends = f"group == {groups - 1} ? {columns} : (group + 1) * {op.group}"
        total = "total = part;" if groups == 1 else "total = group == 0 ? part : total + part;"
        if source.is_float:
            add = [f"sum = sum + {x}[k] * {weight};"]
            start = "rounded sum = 0.0f, part;"
        else:
            add = [f"sum += (int32_t){x}[k] * {weight};"]
            correct = self._constants.array(f"correction{name}", op.corrections) if op.source_zero else ""
            start = f"int32_t sum = {f'{correct}[{entry}]' if correct else '0'};\nrounded part;"
        one = [
            *start.split("\n"),
            f"const int end = {columns if groups == 1 else ends};",
            f"int k = {'0' if groups == 1 else f'group * {op.group}'};",
            "for (; k < end; ++k) {",
            *indented(add),
            "}",
            "part = (float)sum;",
            *([] if floats else [f"part = part * {gain}[{entry}];"]),
            total,
        ]
        body = (
            one
            if groups == 1
            else [
                f"int group;\nfor (group = 0; group < {groups}; ++group) {{".replace("\n", " "),
                *indented(one),
                "}",
            ]
        )
        value = (
            "total" if target.is_float else f"({c_type(target)})(round_even(clampf(total, low, high)) + zero)"
        )
        return [
            "int row;",
            "for (row = first; row < last; ++row) {",
            *indented(["rounded total = 0.0f;", "{", *indented(body), "}", f"total = total + {bias}[row];"]),
            f"    y[row * positions + at] = {value};",
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
