"""A program as one Triton function, ``compute``, which the kernels of :mod:`~rlquant.deploy.cuda_ops` run on some rows.

Buffers that are made once, as a whole, and read by simple operations stay in registers, one block of columns; all
others pass through memory, a region for each running block of threads, with a barrier after each operation. The
source depends on the program's shapes alone: its numbers lie in three blocks of memory, so programs of one shape
share what is compiled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from rlquant.deploy.c_helpers import C_NAMES
from rlquant.deploy.cuda_constants import DeviceBlocks, power_of_two
from rlquant.deploy.cuda_products import (
    Shape,
    indented,
    looped,
    patch_lines,
    position_lines,
    shape_of,
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

WIDEST = 256
"""Columns of the widest block in registers."""

_AT_ONCE = 64 * 1024  # bytes of weights that shared memory takes at once
_FLOATS_AT_ONCE = 64  # columns of a product of floats, which needs more registers
_POSITIONS = 64  # of a convolution that are computed at once

_BEGINNING = """import triton
import triton.language as tl

from rlquant.deploy.cuda_ops import *  # noqa: F403


@triton.jit
def compute(
    observations, states, results, tag, floats, ints, codes, wide, narrow, first, n,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):
"""


@dataclass(frozen=True)
class CudaSource:
    """A generated program.

    Attributes:
        text: of a module that defines ``compute``.
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
        self.tiles = _in_registers(program)
        self.sizes = {"wide": 0, "narrow": 0}
        self.places: dict[int, tuple[str, int]] = {}
        for index in range(len(program.buffers)):
            if index not in self.tiles:
                self.places[index] = self._place(index)

    def source(self) -> CudaSource:
        lines = self._rows()
        for number, op in enumerate(self.program.ops):
            lines += ["", f"# {_described(self.program, op)}", *_own_names(self._op(op), number)]
            if op.target not in self.tiles:
                lines.append("tl.debug_barrier()")
        lines += ["", *self._head(self.program.head), *self._remember()]
        body = "".join(f"    {line}\n" if line else "\n" for line in lines)
        return CudaSource(_BEGINNING + body, self.blocks, self.sizes["wide"], self.sizes["narrow"])

    # --- where numbers lie

    def _place(self, index: int) -> tuple[str, int]:
        """Name of the memory that holds a buffer, and where it begins in a row of it."""
        inputs, given = len(self.program.inputs), len(self.program.inputs) + len(self.program.states)
        if index < given:
            name, first = ("observations", 0) if index < inputs else ("states", inputs)
            return name, sum(buffer.size for buffer in self.program.buffers[first:index])
        name = "narrow" if self._is_narrow(index) else "wide"
        start = self.sizes[name]
        self.sizes[name] += -(-self.program.buffers[index].size // 32) * 32
        return name, start

    def _is_narrow(self, index: int) -> bool:
        return self.program.buffers[index].bits <= 8

    def _rows(self) -> list[str]:
        """Statements that say where each row begins."""
        size = sum(self.program.buffers[i].size for i in range(len(self.program.inputs)))
        words = self.program.head.outputs + self.program.head.size
        lines = [
            "slots = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)",
            "rows = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)",
            "live = rows < n",
            f"observations_at = observations + rows * {size}",
            f"results_at = rows * {words}",
        ]
        if self.program.states:
            lines.append(f"states_at = states + rows * {self.program.state_size}")
        return lines + [
            f"{name}_at = {name} + slots * {count}" for name, count in self.sizes.items() if count
        ]

    def _at(self, index: int, more: int = 0) -> str:
        name, start = self.places[index]
        return f"{name}_at + {start + more}" if start + more else f"{name}_at"

    def _read(self, index: int, more: int = 0, columns: str = "columns", inside: str = "inside") -> str:
        """Expression of some columns of a buffer, zeros elsewhere."""
        if index in self.tiles:
            return f"b{index}"
        return (
            f"tl.load({self._at(index, more)} + {columns}[None, :], mask=live & {inside}[None, :], other=0)"
        )

    def _write(self, index: int, start: int = 0) -> str:
        """Statement that makes ``y`` some columns of a buffer."""
        if index in self.tiles:
            return f"b{index} = y"
        return f"tl.store({self._at(index, start)} + columns[None, :], y, mask=live & inside[None, :])"

    # --- operations

    def _op(self, op: Op) -> list[str]:
        if isinstance(op, Conv2d):
            return self._convolution(op)
        if isinstance(op, Linear):
            return self._product(op)
        size = self.program.buffers[op.source].size
        if isinstance(op, Gates):
            return self._by_columns(
                op, self.program.buffers[op.target].size // CELL_KINDS[op.kind][1], self._cell(op)
            )
        if isinstance(op, Affine | OneHot) and op.order is not None:
            size = len(op.order)
        return self._by_columns(op, size, self._elementwise(op))

    def _by_columns(self, op: Op, size: int, statements: list[str]) -> list[str]:
        """Statements for all columns of the result, in registers in one block."""
        block = power_of_two(size)
        if not {op.source, op.target} & self.tiles:
            block = min(block, WIDEST)
        return self._blocks(size, block, statements)

    def _blocks(self, size: int, block: int, statements: list[str]) -> list[str]:
        columns = [f"columns = start + tl.arange(0, {block})", f"inside = columns < {size}"]
        return looped("start", size, block, [*columns, *statements])

    def _elementwise(self, op: Op) -> list[str]:
        lines, columns, order = [], "columns", getattr(op, "order", None)
        if order is not None:
            lines = [f"order = tl.load(ints + {self.blocks.add(order)} + columns, mask=inside, other=0)"]
            columns = "order"
        lines.append(f"x = real({self._read(op.source, columns=columns)})")
        if isinstance(op, Affine):
            gain, offset, low, high = (self._each(x) for x in (op.gain, op.offset, op.low, op.high))
            clamp = "clamp" if self.program.buffers[op.target].is_float else "limited"
            lines += [f"y = x * {gain}", f"y = {clamp}(y + {offset}, {low}, {high})"]
            lines += self._to_grid(op.target, "0")
        elif isinstance(op, OneHot):
            lines.append(f"y = tl.where(x == {self._each(op.value)}, 1.0, 0.0)")
        elif isinstance(op, Table):
            less, kind = (128, "int8") if self._is_narrow(op.target) else (0, "float32")
            table = self.blocks.add(op.table.astype(np.int32) - less)
            lines.append(f"y = tl.load(ints + {table} + x.to(tl.int32)).to(tl.{kind})")
        elif isinstance(op, Activate):
            lines.append(f"y = {C_NAMES[op.kind]}(x)")
        return [*lines, self._write(op.target, getattr(op, "start", 0))]

    def _each(self, values: np.ndarray) -> str:
        """Expression of float32 numbers, one for each column or one for all."""
        start = self.blocks.add(values.astype(np.float32))
        if len(values) == 1:
            return f"tl.load(floats + {start})"
        return f"tl.load(floats + {start} + columns, mask=inside, other=0)[None, :]"

    def _to_grid(self, target: int, zero: str) -> list[str]:
        if self.program.buffers[target].is_float:
            return []
        return [f"y = {'narrow' if self._is_narrow(target) else 'wide'}_grid(y, {zero})"]

    def _cell(self, op: Gates) -> list[str]:
        """Equations of :mod:`~rlquant.deploy.reference`."""
        gates, vectors = CELL_KINDS[op.kind]
        size = self.program.buffers[op.target].size // vectors
        lines = [f"x{i} = {self._read(op.source, i * size)}" for i in range(2 * gates)]
        if op.kind == "LSTM":
            lines += [
                f"kept = sigmoid32(x1 + x5) * {self._read(op.memory, size)}",
                "y = kept + sigmoid32(x0 + x4) * tanh32(x2 + x6)",
                self._write(op.target, size),
                "y = sigmoid32(x3 + x7) * tanh32(y)",
            ]
        else:
            lines += [
                "update = sigmoid32(x1 + x4)",
                "new = tanh32(x2 + sigmoid32(x0 + x3) * x5)",
                f"y = (1.0 - update) * new + update * {self._read(op.memory)}",
            ]
        return [*lines, self._write(op.target)]

    # --- products

    def _product(self, op: Linear) -> list[str]:
        widest = _FLOATS_AT_ONCE if self.program.buffers[op.source].is_float else 128
        if op.target in self.tiles:
            widest = WIDEST
        shape = shape_of(self.program, op, widest=widest, whole=op.source in self.tiles)
        load = [f"x = {self._read(op.source, columns='column', inside='used')}"]
        statements = [
            "units = columns",
            *self._sums(op, shape, load, "ROWS"),
            self._write(op.target, op.start),
        ]
        return self._blocks(shape.each, shape.columns, statements)

    def _convolution(self, op: Conv2d) -> list[str]:
        """Image after image; the rows of the product are positions."""
        positions = op.out_size[0] * op.out_size[1]
        shape = shape_of(self.program, op, widest=64, whole=False)
        (source, begin), (target, end) = self.places[op.source], self.places[op.target]
        outside = f"{op.source_zero - (128 if self._is_narrow(op.source) else 0)}"
        load = patch_lines(op, f"image + {begin}", outside)
        store = f"(units - block * {shape.room - shape.each})[None, :] * {positions} + positions[:, None]"
        statements = [
            f"columns = start + tl.arange(0, {shape.columns})",
            f"units = block * {shape.room} + columns",
            *self._sums(op, shape, load, f"{_POSITIONS}"),
            f"made = (columns < {shape.each})[None, :] & (positions < {positions})[:, None]",
            f"tl.store(result + {end + op.start} + {store}, y, mask=made)",
        ]
        loops = looped("start", shape.each, shape.columns, statements)
        loops = [*position_lines(op, _POSITIONS), *looped("block", shape.blocks, 1, loops)]
        loops = looped("place", positions, _POSITIONS, loops)
        ends = [self._one(source, "image"), self._one(target, "result")]
        return ["for row in range(first, tl.minimum(first + ROWS, n)):", *indented([*ends, *loops])]

    def _one(self, name: str, pointer: str) -> str:
        """Statement that sets a pointer to a row of some memory."""
        if name in self.sizes:
            return f"{pointer} = {name} + (tl.min(slots) + row - first) * {self.sizes[name]}"
        size = sum(self.program.buffers[i].size for i, (other, _) in self.places.items() if other == name)
        return f"{pointer} = {name} + (tl.min(slots) * 0 + row) * {size}"

    def _sums(self, op: Linear, shape: Shape, load: list[str], rows: str) -> list[str]:
        planes = 1 if self._is_narrow(op.source) else 2
        lines = sum_lines(op, shape, self.blocks, load, rows, planes)
        if self.program.buffers[op.target].is_float:
            return lines
        low, high = (self._each(np.array([x], np.float32)) for x in (op.low - op.zero, op.high - op.zero))
        zero = f"tl.load(ints + {self.blocks.add(np.array([op.zero], np.int32))})"
        return [*lines, f"y = limited(y, {low}, {high})", *self._to_grid(op.target, zero)]

    # --- what comes out

    def _head(self, head: ProgramHead) -> list[str]:
        """Statements that store the outputs and the action."""
        block = power_of_two(head.outputs)
        output = self.program.output
        lines = [
            "# outputs, and the action",
            f"columns = tl.arange(0, {block})",
            f"inside = columns < {head.outputs}",
            f"y = {self._read(output)}",
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
            copy = [f"y = {self._read(after)}", self._write(state)]
            lines += _own_names(self._blocks(size, min(WIDEST, power_of_two(size)), copy), len(lines))
        return lines


def _in_registers(program: Program) -> set[int]:
    """Buffers that one operation makes as a whole, and that only operations on whole blocks read."""
    found = set()
    for index, buffer in enumerate(program.buffers):
        writers = [op for op in program.ops if op.target == index]
        readers = [op for op in program.ops if index in (op.source, getattr(op, "memory", None))]
        once = len(writers) == 1 and _makes_all(program, writers[0])
        small = power_of_two(buffer.size) <= WIDEST and index not in dict(program.states).values()
        if once and small and all(_reads_blocks(program, op) for op in readers):
            found.add(index)
    return found


def _makes_all(program: Program, op: Op) -> bool:
    """Whether it computes all of its target, in registers."""
    if isinstance(op, Conv2d | Gates):
        return False
    order = getattr(op, "order", None)
    size = op.weight.rows if isinstance(op, Linear) else program.buffers[op.source].size
    if isinstance(op, Linear) and program.buffers[op.source].is_float and size > _FLOATS_AT_ONCE:
        return False
    return program.buffers[op.target].size == (size if order is None else len(order))


def _reads_blocks(program: Program, op: Op) -> bool:
    """Whether it can take its source from registers, all columns at once."""
    if isinstance(op, Linear):
        width = 4 if program.buffers[op.source].is_float else 1
        weights = width * power_of_two(op.weight.columns) * min(WIDEST, power_of_two(op.weight.rows))
        return not isinstance(op, Conv2d) and op.gain.shape[1] == 1 and weights <= _AT_ONCE
    return isinstance(op, Table | Activate) or (isinstance(op, Affine) and op.order is None)


def _own_names(lines: list[str], number: int) -> list[str]:
    """With a number after each local name: Triton wants a variable to keep its type."""
    text = "\n".join(lines)
    names = set(re.findall(r"^ *(?:for )?([a-z]\w*) (?:=|in) ", text, re.MULTILINE))
    own = "|".join(name for name in names if not re.fullmatch(r"b\d+", name))
    return re.sub(rf"(?<![.\w])({own})(?!\w)", rf"\1_{number}", text).splitlines()


def _described(program: Program, op: Op) -> str:
    source, target = program.buffers[op.source], program.buffers[op.target]
    what = f", {op.weight.bits}-bit weights" if isinstance(op, Linear) else ""
    return (
        f"{type(op).__name__}{what}: {source.size} x {source.bits} bits -> {target.size} x {target.bits} bits"
    )
