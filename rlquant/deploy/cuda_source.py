"""A program as one Triton function, ``compute``, which the kernels of :mod:`~rlquant.deploy.cuda_ops` run on some rows.

Buffers that are made once, as a whole, and read by simple operations stay in registers, one block of columns; all
others pass through memory, a region for each running block of threads, with a barrier after each operation. The
source depends on the program's shapes, and on what stands outside of its images; all other numbers lie in three blocks
of memory, so programs of one shape share what is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlquant.deploy.c_helpers import C_NAMES
from rlquant.deploy.cuda_constants import DeviceBlocks, power_of_two
from rlquant.deploy.cuda_layout import FLOATS_AT_ONCE, Layout
from rlquant.deploy.cuda_products import (
    WIDEST,
    Shape,
    Stored,
    indented,
    looped,
    multiply_line,
    patch_lines,
    position_lines,
    shape_of,
    store,
    sum_lines,
)
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import (
    CELL_KINDS,
    Activate,
    Affine,
    Conv2d,
    Gates,
    Linear,
    OneHot,
    Op,
    Program,
    Table,
)

__all__ = ["CudaSource", "generate"]

_HELD = 96 * 1024  # bytes of weights that are loaded once, before rows or requests come
_POSITIONS = 64  # of a convolution that are computed at once

_BEGINNING = """import triton
import triton.language as tl

from rlquant.deploy.cuda_ops import *  # noqa: F403


@triton.jit
def hold(codes, ROWS: tl.constexpr):
{hold}

@triton.jit
def compute(
    observations, states, results, tag, held, floats, ints, codes, wide, narrow, first, n,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):
    FLOAT_STEP: tl.constexpr = 128 if ROWS == 1 else 32
"""


@dataclass(frozen=True)
class CudaSource:
    """A generated program.

    Attributes:
        text: of a module that defines ``hold``, which loads weights, and ``compute``.
        blocks: its numbers.
        wide, narrow: numbers of scratch memory for each row, float32 and int8.
    """

    text: str
    blocks: DeviceBlocks
    wide: int
    narrow: int

    @property
    def in_registers(self) -> bool:
        """Whether no number passes through memory on its way."""
        return self.wide + self.narrow == 0


def generate(program: Program) -> CudaSource:
    """Write a program in Triton."""
    return _Writer(program).source()


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.blocks = DeviceBlocks()
        self.at = Layout(program)
        self.held: dict[str, str] = {}
        self.held_bytes = 0

    def source(self) -> CudaSource:
        lines = []
        for number, op in enumerate(self.program.ops):
            lines += ["", f"# {_described(self.program, op)}", *_own_names(self._op(op, number), number)]
            if op.target not in self.at.tiles:
                lines.append("tl.debug_barrier()")
        lines += ["", *self._head(self.program.head), *self._remember()]
        unpacked = [f"{name} = held[{number}]" for number, name in enumerate(self.held)]
        compute = [*unpacked, *self.at.row_lines(), *lines]
        text = _BEGINNING.format(hold=_text(self._hold())) + _text(compute)
        return CudaSource(text, self.blocks, self.at.sizes["wide"], self.at.sizes["narrow"])

    # --- operations

    def _op(self, op: Op, number: int) -> list[str]:
        if isinstance(op, Conv2d):
            return self._convolution(op)
        if isinstance(op, Linear):
            return self._product(op, number)
        size = self.program.buffers[op.source].size
        if isinstance(op, Gates):
            size = self.program.buffers[op.target].size // CELL_KINDS[op.kind][1]
            return self._by_columns(op, size, lambda block: self._cell(op))
        if isinstance(op, Affine | OneHot) and op.order is not None:
            size = len(op.order)
        return self._by_columns(op, size, self._elementwise(op))

    def _by_columns(self, op: Op, size: int, statements: Callable[[int], list[str]]) -> list[str]:
        """Statements for all columns of the result: one block after the other where they stay in registers."""
        in_registers = [index for index in (op.target, op.source) if index in self.at.tiles]
        block = self.at.block(in_registers[0]) if in_registers else min(WIDEST, power_of_two(size))
        return self._blocks(size, block, statements, unrolled=bool(in_registers))

    def _blocks(
        self, size: int, block: int, statements: Callable[[int], list[str]], *, unrolled: bool = False
    ) -> list[str]:
        columns = [f"columns = start + tl.arange(0, {block})", f"inside = columns < {size}"]
        if not unrolled:
            return looped("start", size, block, [*columns, *statements(0)])
        lines = []
        for number in range(-(-size // block)):
            lines += [f"start = {number * block}", *columns, *statements(number)]
        return lines

    def _elementwise(self, op: Op) -> Callable[[int], list[str]]:
        order, columns, before = getattr(op, "order", None), "columns", list[str]()
        if order is not None:
            before = [f"order = tl.load(ints + {self.blocks.add(order)} + columns, mask=inside, other=0)"]
            columns = "order"
        change = self._change(op)

        def statements(block: int) -> list[str]:
            read = f"x = real({self.at.read(op.source, columns=columns, block=block)})"
            return [*before, read, *change, self.at.write(op.target, getattr(op, "start", 0), block)]

        return statements

    def _change(self, op: Op) -> list[str]:
        """Statements from ``x`` to ``y``."""
        if isinstance(op, Affine):
            gain, offset, low, high = (self._each(x) for x in (op.gain, op.offset, op.low, op.high))
            clamp = "clamp" if self.program.buffers[op.target].is_float else "limited"
            lines = [f"y = x * {gain}", f"y = {clamp}(y + {offset}, {low}, {high})"]
            return [*lines, *self._to_grid(op.target, "0")]
        if isinstance(op, OneHot):
            return [f"y = tl.where(x == {self._each(op.value)}, 1.0, 0.0)"]
        if isinstance(op, Table):
            less, kind = (128, "int8") if self.at.is_narrow(op.target) else (0, "float32")
            table = self.blocks.add(op.table.astype(np.int32) - less)
            return [f"y = tl.load(ints + {table} + x.to(tl.int32)).to(tl.{kind})"]
        assert isinstance(op, Activate)
        return [f"y = {C_NAMES[op.kind]}(x)"]

    def _each(self, values: np.ndarray) -> str:
        """Expression of float32 numbers, one for each column or one for all."""
        start = self.blocks.add(values.astype(np.float32))
        if len(values) == 1:
            return f"tl.load(floats + {start})"
        return f"tl.load(floats + {start} + columns, mask=inside, other=0)[None, :]"

    def _to_grid(self, target: int, zero: str) -> list[str]:
        if self.program.buffers[target].is_float:
            return []
        return [f"y = {'narrow' if self.at.is_narrow(target) else 'wide'}_grid(y, {zero})"]

    def _cell(self, op: Gates) -> list[str]:
        """Equations of :mod:`~rlquant.deploy.reference`."""
        gates, vectors = CELL_KINDS[op.kind]
        size = self.program.buffers[op.target].size // vectors
        lines = [f"x{i} = {self.at.read(op.source, i * size)}" for i in range(2 * gates)]
        if op.kind == "LSTM":
            lines += [
                f"kept = sigmoid32(x1 + x5) * {self.at.read(op.memory, size)}",
                "y = kept + sigmoid32(x0 + x4) * tanh32(x2 + x6)",
                self.at.write(op.target, size),
                "y = sigmoid32(x3 + x7) * tanh32(y)",
            ]
        else:
            lines += [
                "update = sigmoid32(x1 + x4)",
                "new = tanh32(x2 + sigmoid32(x0 + x3) * x5)",
                f"y = (1.0 - update) * new + update * {self.at.read(op.memory)}",
            ]
        return [*lines, self.at.write(op.target)]

    # --- products

    def _product(self, op: Linear, number: int) -> list[str]:
        block = self.at.block(op.source) if op.source in self.at.tiles else None
        if op.target in self.at.tiles:
            columns = self.at.block(op.target)
        else:
            widest = FLOATS_AT_ONCE if self.program.buffers[op.source].is_float else WIDEST
            columns = min(widest, power_of_two(op.weight.rows))
        shape = shape_of(self.program, op, columns=columns, block=block)
        if block:
            source = [f"b{op.source}_{i}" for i in range(shape.span // block)]
        else:
            source = [f"x = {self.at.read(op.source, columns='column', inside='used')}"]
        stored = store(op, shape, self.blocks)
        multiply = self._held(op, number, shape, stored) or self._multiply(op, shape, stored)
        sums = ["units = columns", *self._sums(op, shape, multiply, source, "ROWS")]

        def statements(block: int) -> list[str]:
            lines = [line.replace("@", f"{block}") for line in sums]
            return [*lines, self.at.write(op.target, op.start, block)]

        return self._blocks(shape.each, columns, statements, unrolled=op.target in self.at.tiles)

    def _held(self, op: Linear, number: int, shape: Shape, stored: Stored) -> str | None:
        """As :func:`multiply_line`, of weights that were loaded before; None where they are too many."""
        in_registers = {op.source, op.target} <= self.at.tiles and self.at.is_narrow(op.source)
        if not in_registers or stored.digits != 1 or self.held_bytes + stored.size > _HELD:
            return None
        self.held_bytes += stored.size
        for block in range(shape.room // shape.columns):
            for i in range(shape.span // shape.step):
                units = f"{block * shape.columns} + tl.arange(0, {shape.columns})"
                place = f"{i * shape.step}, {shape.span}, {shape.step}"
                name = f"w{number}_{block}_{i}"
                self.held[name] = f"weights(codes + {stored.start}, {units}, {place}, ROWS)"
        return f"acc += product({{x}}, w{number}_@_{{number}})"

    def _hold(self) -> list[str]:
        """Statements that load weights."""
        names = "".join(f"{name}, " for name in self.held) or "0,"
        return [*(f"{name} = {load}" for name, load in self.held.items()), f"return ({names.strip()})"]

    def _multiply(self, op: Linear, shape: Shape, stored: Stored) -> str:
        return multiply_line(shape, stored, self.at.planes(op.source))

    def _convolution(self, op: Conv2d) -> list[str]:
        """Image after image; the rows of the product are positions."""
        positions = op.out_size[0] * op.out_size[1]
        columns = min(64, power_of_two(op.weight.rows // op.blocks))
        shape = shape_of(self.program, op, columns=columns, block=None)
        (source, begin), (target, end) = self.at.places[op.source], self.at.places[op.target]
        outside = f"{op.source_zero - (128 if self.at.is_narrow(op.source) else 0)}"
        multiply = self._multiply(op, shape, store(op, shape, self.blocks))
        load = patch_lines(op, f"image + {begin}", outside)
        place = f"(units - block * {shape.room - shape.each})[None, :] * {positions} + positions[:, None]"
        statements = [
            f"columns = start + tl.arange(0, {shape.columns})",
            f"units = block * {shape.room} + columns",
            *self._sums(op, shape, multiply, load, f"{_POSITIONS}"),
            f"made = (columns < {shape.each})[None, :] & (positions < {positions})[:, None]",
            f"tl.store(result + {end + op.start} + {place}, y, mask=made)",
        ]
        loops = looped("start", shape.each, shape.columns, statements)
        loops = [*position_lines(op, _POSITIONS), *looped("block", shape.blocks, 1, loops)]
        loops = looped("place", positions, _POSITIONS, loops)
        ends = [self.at.row(source, "image"), self.at.row(target, "result")]
        return ["for row in range(first, tl.minimum(first + ROWS, n)):", *indented([*ends, *loops])]

    def _sums(self, op: Linear, shape: Shape, multiply: str, source: list[str], rows: str) -> list[str]:
        lines = sum_lines(op, shape, self.blocks, multiply, source, rows, self.at.planes(op.source))
        if self.program.buffers[op.target].is_float:
            return lines
        low, high = (self._each(np.array([x], np.float32)) for x in (op.low - op.zero, op.high - op.zero))
        zero = f"tl.load(ints + {self.blocks.add(np.array([op.zero], np.int32))})"
        return [*lines, f"y = limited(y, {low}, {high})", *self._to_grid(op.target, zero)]

    # --- what comes out

    def _head(self, head: ProgramHead) -> list[str]:
        """Statements that store the outputs and the action."""
        block = power_of_two(head.outputs, self.at.block(self.program.output))
        output = self.program.output
        lines = [
            "# outputs, and the action",
            f"columns = tl.arange(0, {block})",
            f"inside = columns < {head.outputs}",
            f"y = {self.at.read(output)}",
            "put(results, results_at + columns[None, :], y, live & inside[None, :], tag, PAIRS)",
        ]
        if head.kind in ("argmax", "multi_argmax"):
            ends = np.cumsum(head.branches if head.kind == "multi_argmax" else (head.outputs,)).tolist()
            for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                at = f"results_at + {head.outputs + number}"
                lines.append(f"put(results, {at}, choice(y, columns, {start}, {end}), live, tag, PAIRS)")
            return lines
        if head.kind == "threshold":
            lines.append("y = (y > 0.0).to(tl.int32)")
        else:
            assert head.low is not None
            assert head.high is not None
            low = self._each(head.low)
            if head.kind == "clip":
                lines.append(f"y = clamp(y, {low}, {self._each(head.high)})")
            else:
                squashed = "tanh32(y)" if head.kind == "tanh" else "y"
                span = self._each(head.high - head.low)
                lines += [f"y = 0.5 * ({squashed} + 1.0)", f"y = {low} + y * {span}"]
        at = f"results_at + {head.outputs} + columns[None, :]"
        return [*lines, f"put(results, {at}, y, live & inside[None, :], tag, PAIRS)"]

    def _remember(self) -> list[str]:
        """Statements that take over what is remembered until the next step."""
        lines: list[str] = []
        for state, after in self.program.states:
            size = self.program.buffers[state].size
            move = [f"y = {self.at.read(after)}", self.at.write(state)]
            columns = [f"columns = start + tl.arange(0, {WIDEST})", f"inside = columns < {size}"]
            copy = looped("start", size, WIDEST, [*columns, *move])
            lines += _own_names(copy, len(lines))
        return lines


def _text(lines: list[str]) -> str:
    return "".join(f"    {line}\n" if line else "\n" for line in lines)


def _own_names(lines: list[str], number: int) -> list[str]:
    """With a number after each local name: Triton wants a variable to keep its type."""
    text = "\n".join(lines)
    names = set(re.findall(r"^ *(?:for )?([a-z]\w*) (?:=|in) ", text, re.MULTILINE))
    own = "|".join(name for name in names if not re.fullmatch(r"b\d+_\d+", name))
    return re.sub(rf"(?<![.\w])({own})(?!\w)", rf"\1_{number}", text).splitlines()


def _described(program: Program, op: Op) -> str:
    source, target = program.buffers[op.source], program.buffers[op.target]
    what = f", {op.weight.bits}-bit weights" if isinstance(op, Linear) else ""
    return (
        f"{type(op).__name__}{what}: {source.size} x {source.bits} bits -> {target.size} x {target.bits} bits"
    )
