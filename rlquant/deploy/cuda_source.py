"""A program as one Triton function, ``compute``, which the kernels of :mod:`~rlquant.deploy.cuda_ops` run on some rows.

Buffers that are made once, as a whole, and read by simple operations stay in registers, one block of columns; all
others pass through memory, a region for each running block of threads, with a barrier after each operation. The
source depends on the program's shapes alone: its numbers lie in three blocks of memory, so programs of one shape
share what is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlquant.deploy.c_helpers import C_NAMES
from rlquant.deploy.cuda_constants import DeviceBlocks, power_of_two
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

_MOST = 512  # columns of the widest buffer in registers
_FLOATS_AT_ONCE = 64  # columns of a product of floats, which needs more registers
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
        self.held: dict[str, str] = {}
        self.held_bytes = 0
        self.places: dict[int, tuple[str, int]] = {}
        for index in range(len(program.buffers)):
            if index not in self.tiles:
                self.places[index] = self._place(index)

    def source(self) -> CudaSource:
        lines = []
        for number, op in enumerate(self.program.ops):
            lines += ["", f"# {_described(self.program, op)}", *_own_names(self._op(op, number), number)]
            if op.target not in self.tiles:
                lines.append("tl.debug_barrier()")
        lines += ["", *self._head(self.program.head), *self._remember()]
        text = _BEGINNING.format(hold=_indented_text(self._hold())) + _indented_text([*self._rows(), *lines])
        return CudaSource(text, self.blocks, self.sizes["wide"], self.sizes["narrow"])

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
            *(f"{name} = held[{number}]" for number, name in enumerate(self.held)),
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

    def _read(
        self, index: int, more: int = 0, columns: str = "columns", inside: str = "inside", block: int = 0
    ) -> str:
        """Expression of some columns of a buffer, zeros elsewhere; of ``block`` where it is in registers."""
        if index in self.tiles:
            return f"b{index}_{block}"
        return (
            f"tl.load({self._at(index, more)} + {columns}[None, :], mask=live & {inside}[None, :], other=0)"
        )

    def _write(self, index: int, start: int = 0, block: int = 0) -> str:
        """Statement that makes ``y`` some columns of a buffer."""
        if index in self.tiles:
            return f"b{index}_{block} = y"
        return f"tl.store({self._at(index, start)} + columns[None, :], y, mask=live & inside[None, :])"

    def _block(self, index: int) -> int:
        """Columns of a buffer's blocks; those of the last product have no more than they need."""
        writer = next((op for op in self.program.ops if op.target == index), None)
        last = index == self.program.output and isinstance(writer, Linear)
        return min(WIDEST, power_of_two(self.program.buffers[index].size, 8 if last else 32))

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
        in_registers = [index for index in (op.target, op.source) if index in self.tiles]
        block = self._block(in_registers[0]) if in_registers else min(WIDEST, power_of_two(size))
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
            read = f"x = real({self._read(op.source, columns=columns, block=block)})"
            return [*before, read, *change, self._write(op.target, getattr(op, "start", 0), block)]

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
            less, kind = (128, "int8") if self._is_narrow(op.target) else (0, "float32")
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

    def _product(self, op: Linear, number: int) -> list[str]:
        block = self._block(op.source) if op.source in self.tiles else None
        if op.target in self.tiles:
            columns = self._block(op.target)
        else:
            widest = _FLOATS_AT_ONCE if self.program.buffers[op.source].is_float else WIDEST
            columns = min(widest, power_of_two(op.weight.rows))
        shape = shape_of(self.program, op, columns=columns, block=block)
        if block:
            source = [f"b{op.source}_{i}" for i in range(shape.span // block)]
        else:
            source = [f"x = {self._read(op.source, columns='column', inside='used')}"]
        stored = store(op, shape, self.blocks)
        multiply = self._held(op, number, shape, stored) or self._multiply(op, shape, stored)
        sums = ["units = columns", *self._sums(op, shape, multiply, source, "ROWS")]

        def statements(block: int) -> list[str]:
            return [line.replace("@", f"{block}") for line in sums] + [
                self._write(op.target, op.start, block)
            ]

        return self._blocks(shape.each, columns, statements, unrolled=op.target in self.tiles)

    def _held(self, op: Linear, number: int, shape: Shape, stored: Stored) -> str | None:
        """As :func:`multiply_line`, of weights that were loaded before; None where they are too many."""
        in_registers = {op.source, op.target} <= self.tiles and self._is_narrow(op.source)
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
        return multiply_line(shape, stored, self._planes(op.source))

    def _planes(self, index: int) -> int:
        return 1 if self._is_narrow(index) else 2

    def _convolution(self, op: Conv2d) -> list[str]:
        """Image after image; the rows of the product are positions."""
        positions = op.out_size[0] * op.out_size[1]
        columns = min(64, power_of_two(op.weight.rows // op.blocks))
        shape = shape_of(self.program, op, columns=columns, block=None)
        (source, begin), (target, end) = self.places[op.source], self.places[op.target]
        outside = f"{op.source_zero - (128 if self._is_narrow(op.source) else 0)}"
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
        ends = [self._one(source, "image"), self._one(target, "result")]
        return ["for row in range(first, tl.minimum(first + ROWS, n)):", *indented([*ends, *loops])]

    def _one(self, name: str, pointer: str) -> str:
        """Statement that sets a pointer to a row of some memory."""
        if name in self.sizes:
            return f"{pointer} = {name} + (tl.min(slots) + row - first) * {self.sizes[name]}"
        size = sum(self.program.buffers[i].size for i, (other, _) in self.places.items() if other == name)
        return f"{pointer} = {name} + (tl.min(slots) * 0 + row) * {size}"

    def _sums(self, op: Linear, shape: Shape, multiply: str, source: list[str], rows: str) -> list[str]:
        lines = sum_lines(op, shape, self.blocks, multiply, source, rows, self._planes(op.source))
        if self.program.buffers[op.target].is_float:
            return lines
        low, high = (self._each(np.array([x], np.float32)) for x in (op.low - op.zero, op.high - op.zero))
        zero = f"tl.load(ints + {self.blocks.add(np.array([op.zero], np.int32))})"
        return [*lines, f"y = limited(y, {low}, {high})", *self._to_grid(op.target, zero)]

    # --- what comes out

    def _head(self, head: ProgramHead) -> list[str]:
        """Statements that store the outputs and the action."""
        block = power_of_two(head.outputs, self._block(self.program.output))
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
            copy = self._blocks(
                size,
                WIDEST,
                lambda block, state=state, after=after: [f"y = {self._read(after)}", self._write(state)],
            )
            lines += _own_names(copy, len(lines))
        return lines


def _in_registers(program: Program) -> set[int]:
    """Buffers that one operation makes as a whole, and that only operations on whole blocks read."""
    found = set()
    for index, buffer in enumerate(program.buffers):
        writers = [op for op in program.ops if op.target == index]
        readers = [op for op in program.ops if index in (op.source, getattr(op, "memory", None))]
        once = len(writers) == 1 and _makes_all(program, writers[0])
        most = WIDEST if index == program.output else _MOST  # the head takes one block
        small = buffer.size <= most and index not in dict(program.states).values()
        if once and small and all(_reads_blocks(op) for op in readers):
            found.add(index)
    return found


def _makes_all(program: Program, op: Op) -> bool:
    """Whether it computes all of its target, block after block."""
    if isinstance(op, Conv2d | Gates):
        return False
    order = getattr(op, "order", None)
    size = op.weight.rows if isinstance(op, Linear) else program.buffers[op.source].size
    if isinstance(op, Linear) and program.buffers[op.source].is_float and size > _FLOATS_AT_ONCE:
        return False
    return program.buffers[op.target].size == (size if order is None else len(order))


def _reads_blocks(op: Op) -> bool:
    """Whether it can take its source from registers, block after block."""
    if isinstance(op, Linear):
        return not isinstance(op, Conv2d) and op.gain.shape[1] == 1
    return isinstance(op, Table | Activate) or (isinstance(op, Affine) and op.order is None)


def _indented_text(lines: list[str]) -> str:
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
