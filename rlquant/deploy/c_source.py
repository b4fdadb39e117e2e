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
from rlquant.deploy.c_memory import Layout
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import CELL_KINDS, Activate, Affine, Gates, Linear, OneHot, Op, Program

__all__ = ["CSource", "Numbers", "Products", "action_type", "generate", "indented"]


class Products(Protocol):
    """How matrix products are written."""

    members: list[str]

    def lines(self, op: Linear, name: str) -> list[str]:
        """Statements that read ``x`` and write ``y``."""


class Numbers(Protocol):
    """How real numbers are computed with: in floats or in fixed point."""

    def affine(self, op: Affine, name: str, at: str) -> list[str]:
        """Statements from ``x[at]`` to ``y[i]``."""

    def hot(self, op: OneHot, name: str, at: str) -> list[str]:
        """Statements from ``x[at]`` to ``y[i]``."""

    def box(self, head: ProgramHead) -> list[str]:
        """Statements from ``y[i]`` to ``action[i]``, within bounds."""


@dataclass(frozen=True)
class CSource:
    """The parts of a source.

    Attributes:
        memory: the type ``policy_memory``.
        helpers: functions that the others call.
        compute: statements on ``observation``, ``memory`` and, where the program remembers anything, ``state``.
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


def generate(
    program: Program, constants: Constants, products: Products, numbers: Numbers, layout: Layout
) -> CSource:
    """Write a program in C."""
    lines: list[str] = []
    for index, op in enumerate(program.ops):
        lines += _block(
            program, layout, op, _statements(layout, op, f"{index}", constants, products, numbers)
        )
    lines += _remember(program, layout)
    decide = "\n".join(indented(_decide(program.head, numbers)))
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


def _block(program: Program, layout: Layout, op: Op, statements: list[str]) -> list[str]:
    source, target = program.buffers[op.source], program.buffers[op.target]
    start = getattr(op, "start", 0)
    what = type(op).__name__.lower() + (f", {op.weight.bits}-bit weights" if isinstance(op, Linear) else "")
    return [
        f"{{ /* {what}: {source.size} x {source.bits} bits -> {target.size} x {target.bits} bits */",
        *indented(
            [
                f"const {layout.kind(op.source)} *restrict x = {layout.pointer(op.source)};",
                f"{layout.kind(op.target)} *restrict y = {layout.pointer(op.target)}{f' + {start}' if start else ''};",
                *statements,
            ]
        ),
        "}",
    ]


def _statements(
    layout: Layout, op: Op, name: str, constants: Constants, products: Products, numbers: Numbers
) -> list[str]:
    program = layout.program
    source, target = program.buffers[op.source], program.buffers[op.target]
    if isinstance(op, Linear):
        return products.lines(op, name)
    if isinstance(op, Affine):
        size = len(op.order) if op.order is not None else source.size
        at = "i" if op.order is None else f"{constants.array(f'order{name}', op.order)}[i]"
        return loop(size, numbers.affine(op, name, at))
    if isinstance(op, OneHot):
        at = f"{constants.array(f'order{name}', op.order)}[i]"
        return loop(target.size, numbers.hot(op, name, at))
    if isinstance(op, Gates):
        size = target.size // CELL_KINDS[op.kind][1]
        memory = f"const float *restrict m = {layout.pointer(op.memory)};"
        return [memory, *loop(size, _lstm(size) if op.kind == "LSTM" else _gru(size))]
    if isinstance(op, Activate):
        return loop(source.size, [f"y[i] = {C_NAMES[op.kind]}(x[i]);"])
    small = op.table.astype(np.uint8) if target.bits <= 8 else op.table
    table = constants.array(f"table{name}", small)
    return loop(source.size, [f"y[i] = {table}[x[i]];"])


def loop(count: int, statements: list[str]) -> list[str]:
    """For each ``i`` below ``count``."""
    return ["int i;", f"for (i = 0; i < {count}; ++i) {{", *indented(statements), "}"]


def _lstm(size: int) -> list[str]:
    """One step of unit ``i``: shares of the gates in ``x``, hidden and cell state in ``m`` and then in ``y``."""
    names = ("in", "forget", "new", "out")
    return [
        *_sums(names, size, 4),
        "rounded cell, kept;",
        f"kept = sigmoid32(forget) * m[i + {size}];",
        "cell = sigmoid32(in) * tanh32(new);",
        "cell = kept + cell;",
        f"y[i + {size}] = cell;",
        "y[i] = sigmoid32(out) * tanh32(cell);",
    ]


def _gru(size: int) -> list[str]:
    """One step of unit ``i``: shares of the gates in ``x``, the hidden state in ``m`` and then in ``y``."""
    return [
        *_sums(("reset", "update"), size, 3),
        f"rounded new = sigmoid32(reset) * x[i + {5 * size}], kept, rest;",
        f"new = x[i + {2 * size}] + new;",
        "update = sigmoid32(update);",
        "kept = update * m[i];",
        "rest = 1.0f - update;",
        "new = rest * tanh32(new);",
        "y[i] = new + kept;",
    ]


def _sums(names: tuple[str, ...], size: int, gates: int) -> list[str]:
    """The shares of a gate from the input and from the hidden state."""
    return [
        f"rounded {name} = x[i + {number * size}] + x[i + {(gates + number) * size}];"
        for number, name in enumerate(names)
    ]


def _remember(program: Program, layout: Layout) -> list[str]:
    """Takes over what is remembered until the next step."""
    return [
        f"{{ int i; for (i = 0; i < {program.buffers[state].size}; ++i) "
        f"{layout.pointer(state)}[i] = {layout.pointer(after)}[i]; }}"
        for state, after in program.states
    ]


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


def _decide(head: ProgramHead, numbers: Numbers) -> list[str]:
    if head.kind in ("argmax", "multi_argmax"):
        return _argmax(head)
    if head.kind == "threshold":
        return loop(head.outputs, ["action[i] = y[i] > 0;"])
    return loop(head.outputs, numbers.box(head))
