"""Programs that hypothesis draws: any width, number of bits, group, zero point, geometry and head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import (
    CELL_KINDS,
    TABLE_BITS,
    Activate,
    Affine,
    Buffer,
    Conv2d,
    Gates,
    Linear,
    OneHot,
    Op,
    Program,
    Table,
    Weight,
)

Draw = Callable[[Any], Any]


@st.composite
def programs(draw: Draw, widest: int = 40) -> Program:
    """An integer program; what floats it has are exact in every runtime (affine maps, ReLU, tanh)."""
    return _Author(draw, widest).program()


def observations(program: Program, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal ones of many magnitudes, and in the first rows extremes: infinities, the largest and smallest floats."""
    rng = np.random.default_rng(seed)
    found = {}
    for key, shape in program.inputs.items():
        scale = 10.0 ** rng.uniform(-2, 1.5, (rows,) + (1,) * len(shape))
        x = (rng.normal(size=(rows, *shape)) * scale).astype(np.float32)
        extremes = np.array([np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0], np.float32)
        first = min(rows, 16)
        x[:first] = rng.choice(extremes, (first, *shape))
        x[first::4] = np.rint(x[first::4])  # what one-hot codes are made of
        found[key] = x
    return found


def memories(program: Program, rows: int, seed: int = 0) -> np.ndarray:
    """What a program may remember: zeros in the first half of the rows."""
    states = np.random.default_rng(seed).normal(0, 2, (rows, program.state_size)).astype(np.float32)
    states[: rows // 2] = 0
    return states


class _Author:
    def __init__(self, draw: Draw, widest: int) -> None:
        self.draw, self.widest = draw, widest
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.buffers: list[Buffer] = []
        self.ops: list[Op] = []
        self.states: list[tuple[int, int]] = []
        self.image: tuple[int, int, int] | None = None

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def chance(self) -> bool:
        return bool(self.draw(st.booleans()))

    def buffer(self, size: int, bits: int = 32) -> int:
        self.buffers.append(Buffer(size, bits))
        return len(self.buffers) - 1

    def program(self) -> Program:
        inputs = self.inputs()
        for shape in inputs.values():
            self.buffer(int(np.prod(shape)))
        kind = self.draw(st.sampled_from([None, None, *CELL_KINDS])) if self.image is None else None
        hidden = self.number(1, self.widest // 2)
        memory = self.buffer(CELL_KINDS[kind][1] * hidden) if kind else 0
        source = self.joined(len(inputs)) if len(inputs) > 1 else 0
        if self.image is None and self.number(0, 3) == 0:
            source = self.one_hot(source)
        if kind:
            source = self.cell(source, memory, kind)
        source = self.observed(source)
        for _ in range(self.number(0, 2) if self.image else 0):
            source = self.product(source, conv=True, bits=self.number(2, 9))
        for _ in range(self.number(0, 2)):
            source = self.layer(source)
        head = self.head()
        source = self.product(source, conv=False, bits=32, rows=head.outputs)
        end = self.draw(st.sampled_from([None, "Affine", "Tanh", "ReLU"]))
        if end == "Affine":
            self.affine(source, head.outputs, 32)
        elif end is not None:
            self.ops.append(Activate(source, self.buffer(head.outputs), end))
        return Program(tuple(self.buffers), inputs, tuple(self.ops), head, "random", tuple(self.states))

    def inputs(self) -> dict[str, tuple[int, ...]]:
        kind = self.draw(st.sampled_from(["vector", "image", "parts"]))
        if kind == "vector":
            return {"": (self.number(1, self.widest),)}
        if kind == "parts":
            return {"goal": (self.number(1, 5),), "action": (self.number(1, 3), 2)}
        self.image = (self.number(1, 4), self.number(3, 9), self.number(3, 9))
        return {"": self.image}

    def joined(self, count: int) -> int:
        target, start = self.buffer(sum(buffer.size for buffer in self.buffers[:count])), 0
        for source in range(count):
            size = self.buffers[source].size
            one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
            self.ops.append(Affine(source, target, one, zero, zero - np.inf, zero + np.inf, start))
            start += size
        return target

    def one_hot(self, source: int) -> int:
        size = self.number(1, self.widest)
        order = self.rng.integers(0, self.buffers[source].size, size).astype(np.int32)
        value = self.rng.integers(-1, 4, size).astype(np.float32)
        self.ops.append(OneHot(source, self.buffer(size), order, value))
        return self.ops[-1].target

    def cell(self, source: int, memory: int, kind: str) -> int:
        """One recurrent layer; the result is all that it remembers."""
        gates, vectors = CELL_KINDS[kind]
        hidden = self.buffers[memory].size // vectors
        shares = self.buffer(2 * gates * hidden)
        for start, given, size in ((0, source, self.buffers[source].size), (gates * hidden, memory, hidden)):
            grid = self.affine(given, size, self.number(2, 9), np.arange(size, dtype=np.int32))
            self.product(grid, conv=False, bits=32, rows=gates * hidden)
            self.buffers.pop()  # what it would have been written to
            self.ops.append(replace(self.ops.pop(), target=shares, start=start))
        after = self.buffer(vectors * hidden)
        self.ops.append(Gates(shares, after, memory, kind))
        self.states.append((memory, after))
        return after

    def observed(self, source: int) -> int:
        """To a grid, by one map for all numbers or one for each."""
        size, bits = self.buffers[source].size, self.number(2, 12)
        order = None
        if self.image is None and self.chance():
            order = self.rng.integers(0, size, self.number(1, self.widest)).astype(np.int32)
            size = len(order)
        elif self.image is not None and self.chance():
            order = self.rng.permutation(size).astype(np.int32)
        return self.affine(source, size, bits, order)

    def affine(self, source: int, size: int, bits: int, order: np.ndarray | None = None) -> int:
        each, top = size if self.chance() else 1, 2.0**bits - 1 if bits < 32 else 4.0
        reach = 1.0 if self.buffers[source].is_float else 2.0 ** self.buffers[source].bits
        gain = (top / reach * self.rng.uniform(0.05, 1.0, each)).astype(np.float32)
        offset = self.rng.uniform(0, top, each).astype(np.float32)
        low, high = np.sort(self.rng.uniform(0, top, (2, each)).astype(np.float32), axis=0)
        low, high = (low - top, high + top) if bits == 32 else (low.round(), high.round())
        target = self.buffer(size, bits)
        self.ops.append(Affine(source, target, gain, offset, low, high, 0, order))
        return target

    def layer(self, source: int) -> int:
        kind = self.draw(st.sampled_from(["plain", "table", "rescaled"]))
        if kind == "plain":
            return self.product(source, conv=False, bits=self.number(2, 9))
        if kind == "rescaled":
            middle = self.product(source, conv=False, bits=self.number(2, 16))
            return self.affine(middle, self.buffers[middle].size, self.number(2, 9))
        fine = self.product(source, conv=False, bits=TABLE_BITS)
        target = self.buffer(self.buffers[fine].size, self.number(2, 9))
        table = self.rng.integers(0, 2 ** self.buffers[target].bits, 2**TABLE_BITS).astype(np.uint16)
        self.ops.append(Table(fine, target, table))
        return target

    def product(self, source: int, *, conv: bool, bits: int, rows: int | None = None) -> int:
        geometry = self.geometry() if conv else {}
        blocks = geometry.get("blocks", 1)
        rows = rows or (blocks * self.number(1, 4) if conv else self.number(1, self.widest))
        columns = self.buffers[source].size
        if conv:
            columns = geometry["image"][0] // blocks * int(np.prod(geometry["kernel"]))
        weight = self.weight(rows, columns, self.number(2, 9))
        group = self.number(1, columns + 2)
        groups = -(-columns // group)
        top = 1 if bits == 32 else 2**bits - 1
        typical = 2.0 ** (self.buffers[source].bits + weight.bits - 2) * np.sqrt(group * groups)
        gain = (top / typical * self.rng.uniform(0.1, 2.0, (rows, groups))).astype(np.float32)
        bias = (top * self.rng.normal(0, 0.3, rows)).astype(np.float32)
        zero, low, high = 0, 0, 0
        if bits < 32:
            zero, low, high = (self.number(0, top), *sorted((self.number(0, top), self.number(0, top))))
        source_zero = self.number(0, 2 ** self.buffers[source].bits - 1)
        parts = (source, 0, weight, bias, gain, group, source_zero, zero, low, high)
        op = Conv2d(*parts, **geometry) if conv else Linear(*parts)
        self.image = (rows, *op.out_size) if isinstance(op, Conv2d) else None
        positions = int(np.prod(op.out_size)) if isinstance(op, Conv2d) else 1
        target = self.buffer(rows * positions, bits)
        op = replace(op, target=target)
        self.ops.append(op)
        return target

    def weight(self, rows: int, columns: int, bits: int) -> Weight:
        """Packed codes: any bytes are a weight."""
        return Weight(
            rows, columns, bits, self.rng.integers(0, 256, -(-rows * columns * bits // 8), np.uint8)
        )

    def geometry(self) -> dict[str, Any]:
        assert self.image is not None
        found: dict[str, Any] = {"image": self.image}
        kernel, padding, dilation = [], [], []
        for length in self.image[1:]:
            padding.append(self.number(0, 1))
            kernel.append(self.number(1, min(3, length + 2 * padding[-1])))
            fits = (length + 2 * padding[-1] - 1) // max(kernel[-1] - 1, 1)
            dilation.append(self.number(1, max(1, min(2, fits))))
        found |= {"kernel": tuple(kernel), "padding": tuple(padding), "dilation": tuple(dilation)}
        blocks = [count for count in range(1, self.image[0] + 1) if self.image[0] % count == 0]
        return found | {
            "stride": (self.number(1, 3), self.number(1, 2)),
            "blocks": self.draw(st.sampled_from(blocks)),
        }

    def head(self) -> ProgramHead:
        kind = self.draw(st.sampled_from(["argmax", "multi_argmax", "threshold", "clip", "tanh", "unscale"]))
        if kind == "argmax":
            return ProgramHead(kind, self.number(1, 6))
        if kind == "multi_argmax":
            branches = tuple(self.number(1, 4) for _ in range(self.number(1, 3)))
            return ProgramHead(kind, sum(branches), branches)
        shape = (self.number(1, 3), 2) if self.chance() else (self.number(1, 6),)
        size = int(np.prod(shape))
        if kind == "threshold":
            return ProgramHead(kind, size, shape=shape)
        low, high = np.sort(self.rng.normal(size=(2, size)).astype(np.float32), axis=0)
        return ProgramHead(kind, size, low=low, high=high, shape=shape)
