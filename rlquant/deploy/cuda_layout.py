"""Where a program's numbers lie on a GPU: in registers, block of columns by block, or in memory."""

from __future__ import annotations

from rlquant.deploy.cuda_constants import power_of_two
from rlquant.deploy.cuda_products import WIDEST
from rlquant.deploy.program import Activate, Affine, Conv2d, Gates, Linear, Op, Program, Table

__all__ = ["FLOATS_AT_ONCE", "Layout"]

FLOATS_AT_ONCE = 64
"""Columns of a product of floats, which needs more registers than one of integers."""

_MOST = 512  # columns of the widest buffer in registers


class Layout:
    """Which buffers stay in registers, and where the others lie in a row of some memory.

    Attributes:
        tiles: indices of the buffers in registers: made by one operation, and read by ones that need whole blocks.
        places: for each other buffer, the name of its memory and where it begins in a row.
        sizes: numbers of a row of scratch memory, by name: ``wide`` is float32, ``narrow`` int8.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tiles = _in_registers(program)
        self.sizes = {"wide": 0, "narrow": 0}
        self.places: dict[int, tuple[str, int]] = {}
        for index in range(len(program.buffers)):
            if index not in self.tiles:
                self.places[index] = self._place(index)

    def _place(self, index: int) -> tuple[str, int]:
        """Name of the memory that holds a buffer, and where it begins in a row of it."""
        inputs, given = len(self.program.inputs), len(self.program.inputs) + len(self.program.states)
        if index < given:
            name, first = ("observations", 0) if index < inputs else ("states", inputs)
            return name, sum(buffer.size for buffer in self.program.buffers[first:index])
        name = "narrow" if self.is_narrow(index) else "wide"
        start = self.sizes[name]
        self.sizes[name] += -(-self.program.buffers[index].size // 32) * 32
        return name, start

    def is_narrow(self, index: int) -> bool:
        """Whether its numbers are int8: those of a grid of up to 8 bits, less 128."""
        return self.program.buffers[index].bits <= 8

    def row_lines(self) -> list[str]:
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

    def read(
        self, index: int, more: int = 0, columns: str = "columns", inside: str = "inside", block: int = 0
    ) -> str:
        """Expression of some columns of a buffer, zeros elsewhere; of ``block`` where it is in registers."""
        if index in self.tiles:
            return f"b{index}_{block}"
        return (
            f"tl.load({self._at(index, more)} + {columns}[None, :], mask=live & {inside}[None, :], other=0)"
        )

    def write(self, index: int, start: int = 0, block: int = 0) -> str:
        """Statement that makes ``y`` some columns of a buffer."""
        if index in self.tiles:
            return f"b{index}_{block} = y"
        return f"tl.store({self._at(index, start)} + columns[None, :], y, mask=live & inside[None, :])"

    def block(self, index: int) -> int:
        """Columns of a buffer's blocks; those of the last product have no more than they need."""
        writer = next((op for op in self.program.ops if op.target == index), None)
        last = index == self.program.output and isinstance(writer, Linear)
        return min(WIDEST, power_of_two(self.program.buffers[index].size, 8 if last else 32))

    def row(self, name: str, pointer: str) -> str:
        """Statement that sets a pointer to a row of some memory."""
        if name in self.sizes:
            return f"{pointer} = {name} + (tl.min(slots) + row - first) * {self.sizes[name]}"
        size = sum(self.program.buffers[i].size for i, (other, _) in self.places.items() if other == name)
        return f"{pointer} = {name} + (tl.min(slots) * 0 + row) * {size}"

    def planes(self, index: int) -> int:
        """Bytes of its integers."""
        return 1 if self.is_narrow(index) else 2


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
    if isinstance(op, Linear) and program.buffers[op.source].is_float and size > FLOATS_AT_ONCE:
        return False
    return program.buffers[op.target].size == (size if order is None else len(order))


def _reads_blocks(op: Op) -> bool:
    """Whether it can take its source from registers, block after block."""
    if isinstance(op, Linear):
        return not isinstance(op, Conv2d) and op.gain.shape[1] == 1
    return isinstance(op, Table | Activate) or (isinstance(op, Affine) and op.order is None)
