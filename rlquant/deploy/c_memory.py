"""Working memory of a generated policy: buffers that never live at the same time share a slot."""

from __future__ import annotations

from dataclasses import dataclass

from rlquant.deploy.program import Buffer, Program

__all__ = ["Layout", "c_type", "layout"]

MARGIN = 64  # entries after a buffer of integers that a product may read and multiply by zero


@dataclass(frozen=True)
class Layout:
    """Which slot each buffer that is no input lies in.

    Attributes:
        slots: the buffers of each slot.
        margin: unused entries after a buffer of integers.
        real: C type of real numbers.
    """

    program: Program
    slots: tuple[tuple[int, ...], ...]
    margin: int
    real: str = "float"

    def declaration(self, extra: list[str]) -> str:
        """The C type ``policy_memory``; ``extra`` are further members."""
        members = [
            "    union {\n" + "".join(f"        {self._member(i)};\n" for i in slot) + f"    }} s{number};\n"
            for number, slot in enumerate(self.slots)
        ]
        members += [f"    {line};\n" for line in extra]
        return "typedef struct {\n" + "".join(members) + "} policy_memory;"

    def pointer(self, index: int) -> str:
        """The C expression of a buffer: in ``observation``, in ``state``, or a member of ``memory``."""
        inputs, given = len(self.program.inputs), len(self.program.inputs) + len(self.program.states)
        if index < given:
            name, first = ("observation", 0) if index < inputs else ("state", inputs)
            start = sum(buffer.size for buffer in self.program.buffers[first:index])
            return f"({name} + {start})" if start else name
        slot = next(number for number, slot in enumerate(self.slots) if index in slot)
        return f"memory->s{slot}.b{index}"

    def kind(self, index: int) -> str:
        """C type of a buffer's numbers."""
        return c_type(self.program.buffers[index], self.real)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(max(self._bytes(i) for i in slot) for slot in self.slots)

    def _bytes(self, index: int) -> int:
        buffer = self.program.buffers[index]
        width = 4 if buffer.is_float else 1 if buffer.bits <= 8 else 2
        return (self._entries(buffer) * width + 3) // 4 * 4

    def _entries(self, buffer: Buffer) -> int:
        return buffer.size + (0 if buffer.is_float else self.margin)

    def _member(self, index: int) -> str:
        buffer = self.program.buffers[index]
        return f"{self.kind(index)} b{index}[{self._entries(buffer)}]"


def layout(program: Program, *, margin: bool = False, real: str = "float") -> Layout:
    """Gives each buffer the first slot that is free from its first write to its last read."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, op in enumerate(program.ops):
        first.setdefault(op.target, step)
        last[op.source] = step
    for index in (program.output, *(after for _, after in program.states)):
        last[index] = len(program.ops)
    slots: list[list[int]] = []
    for index in sorted(first, key=lambda i: first[i]):
        free = (slot for slot in slots if all(last.get(other, first[other]) < first[index] for other in slot))
        slot = next(free, None)
        if slot is None:
            slots.append([index])
        else:
            slot.append(index)
    return Layout(program, tuple(map(tuple, slots)), MARGIN if margin else 0, real)


def c_type(buffer: Buffer, real: str = "float") -> str:
    """``real``, uint8_t or uint16_t."""
    return real if buffer.is_float else "uint8_t" if buffer.bits <= 8 else "uint16_t"
