"""From a program to C: one function that computes the head's outputs, and one that decides on the action.

The same generator writes the source of the native runtime, whose products call ``kernels/vector.h``
(:mod:`~rlquant.deploy.c_vector`), and that of the export, whose products are plain loops
(:mod:`~rlquant.deploy.c_plain`). All the rest, and so the semantics, is the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlquant.deploy.c_constants import Constants
from rlquant.deploy.c_helpers import C_NAMES, helpers_for
from rlquant.deploy.c_memory import Layout, c_type
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import Activate, Affine, Linear, Op, Program

__all__ = ["CSource", "Products", "action_type", "generate", "grid_lines", "indented"]


class Products(Protocol):
    """How matrix products are written."""

    members: list[str]

    def lines(self, op: Linear, name: str) -> list[str]:
        """Statements that read ``x`` and write ``y``."""


@dataclass(frozen=True)
class CSource:
    """The parts of a source.

    Attributes:
        memory: the type ``policy_memory``.
        helpers: functions that the others call.
        compute: statements on ``observation`` and ``memory``.
        output: the expression of the outputs after them, writable.
        decide: statements from ``y`` (outputs) to ``action``.
        action: C type of one number of the action.
    """

    memory: str
    helpers: str
    compute: str
    output: str
    decide: str
    action: str


def generate(program: Program, constants: Constants, products: Products, layout: Layout) -> CSource:
    """Write a program in C."""
    lines: list[str] = []
    for index, op in enumerate(program.ops):
        lines += _block(program, layout, op, _statements(program, op, f"{index}", constants, products))
    decide = "\n".join(indented(_decide(program.head, constants)))
    compute = "\n".join(indented(lines))
    memory = layout.declaration(products.members)
    output = layout.pointer(program.output)
    return CSource(
        memory,
        helpers_for(compute + decide),
        compute,
        output,
        decide,
        action_type(program.head),
    )


def indented(lines: list[str]) -> list[str]:
    """One level deeper."""
    return [f"    {line}" for line in lines]


def action_type(head: ProgramHead) -> str:
    """C type of one number of an action."""
    if head.kind in ("argmax", "multi_argmax"):
        return "policy_index"
    return "int8_t" if head.kind == "threshold" else "float"


def grid_lines(op: Linear, name: str, constants: Constants) -> list[str]:
    """Declares ``low``, ``high`` and ``zero``, by which :data:`TO_GRID` rounds to the grid of a target."""
    return [
        f"const float low = {constants.number(f'low{name}', op.low - op.zero)};",
        f"const float high = {constants.number(f'high{name}', op.high - op.zero)};",
        f"const int32_t zero = (int32_t){constants.number(f'zero{name}', op.zero)};",
    ]


def _block(program: Program, layout: Layout, op: Op, statements: list[str]) -> list[str]:
    source, target = program.buffers[op.source], program.buffers[op.target]
    start = getattr(op, "start", 0)
    what = type(op).__name__.lower() + (f", {op.weight.bits}-bit weights" if isinstance(op, Linear) else "")
    return [
        f"{{ /* {what}: {source.size} x {source.bits} bits -> {target.size} x {target.bits} bits */",
        *indented(
            [
                f"const {c_type(source)} *restrict x = {layout.pointer(op.source)};",
                f"{c_type(target)} *restrict y = {layout.pointer(op.target)}{f' + {start}' if start else ''};",
                *statements,
            ]
        ),
        "}",
    ]


def _statements(program: Program, op: Op, name: str, constants: Constants, products: Products) -> list[str]:
    source, target = program.buffers[op.source], program.buffers[op.target]
    if isinstance(op, Linear):
        return products.lines(op, name)
    if isinstance(op, Affine):
        size = len(op.order) if op.order is not None else source.size
        return _affine(op, size, target.is_float, name, constants)
    if isinstance(op, Activate):
        return _loop(source.size, [f"y[i] = {C_NAMES[op.kind]}(x[i]);"])
    small = op.table.astype(np.uint8) if target.bits <= 8 else op.table
    table = constants.array(f"table{name}", small)
    return _loop(source.size, [f"y[i] = {table}[x[i]];"])


def _loop(count: int, statements: list[str]) -> list[str]:
    return ["int i;", f"for (i = 0; i < {count}; ++i) {{", *indented(statements), "}"]


def _affine(op: Affine, size: int, to_float: bool, name: str, constants: Constants) -> list[str]:
    def entry(part: str) -> str:
        values = getattr(op, part)
        if len(values) == 1:
            return constants.number(f"{part}{name}", values[0])
        return f"{constants.array(f'{part}{name}', values)}[i]"

    at = "i" if op.order is None else f"{constants.array(f'order{name}', op.order)}[i]"
    lines = [f"rounded v = (float)x[{at}];", f"v = v * {entry('gain')};", f"v = v + {entry('offset')};"]
    if not to_float or np.isfinite(op.low).any() or np.isfinite(op.high).any():
        lines.append(f"v = clampf(v, {entry('low')}, {entry('high')});")
    lines.append("y[i] = v;" if to_float else "y[i] = round_even(v);")
    return _loop(size, lines)


def _decide(head: ProgramHead, constants: Constants) -> list[str]:
    if head.kind in ("argmax", "multi_argmax"):
        return _argmax(head)
    if head.kind == "threshold":
        return _loop(head.outputs, ["action[i] = y[i] > 0.0f;"])
    assert head.low is not None
    assert head.high is not None
    low = f"{constants.array('action_low', head.low)}[i]"
    if head.kind == "clip":
        high = f"{constants.array('action_high', head.high)}[i]"
        return _loop(head.outputs, [f"action[i] = clampf(y[i], {low}, {high});"])
    span = f"{constants.array('action_span', head.high - head.low)}[i]"
    squashed = "tanh32(y[i])" if head.kind == "tanh" else "y[i]"
    steps = [f"rounded v = {squashed};", "v = v + 1.0f;", "v = 0.5f * v;", f"v = v * {span};"]
    return _loop(head.outputs, [*steps, f"v = {low} + v;", "action[i] = v;"])


def _argmax(head: ProgramHead) -> list[str]:
    branches = head.branches if head.kind == "multi_argmax" else (head.outputs,)
    lines, start = ["int i, best;"], 0
    for number, size in enumerate(branches):
        lines += [
            f"best = {start};",
            f"for (i = {start + 1}; i < {start + size}; ++i) {{",
            "    if (y[i] > y[best]) best = i;",
            "}",
            f"action[{number}] = best{f' - {start}' if start else ''};",
        ]
        start += size
    return lines
