"""A policy as a short list of operations with exact integer semantics.

Buffers hold one observation's numbers: float32, or unsigned integers of up to 16 bits on a grid. Each operation
reads one buffer and writes (part of) another. What an integer operation computes is fixed to the bit, so that
every runtime agrees with the NumPy interpreter (:mod:`~rlquant.deploy.reference`):

- accumulators are int32: ``acc[o] = sum_k w[o, k] * (q[k] - source_zero)``, one for each group of columns;
- ``y[o] = float32(acc[o]) * gain[o] + bias[o]`` in float32, each operation rounded, no fused multiply-add; with
  groups the products are added one after the other, from the first group on, and the bias last;
- to a grid: ``clamp(rint(y) + zero, low, high)``, half to even. ReLU is the clamp at the zero point;
- to float: ``y`` itself;
- observations: ``clamp(rint(x * gain + offset), low, high)`` with two roundings before the last; the normaliser
  and every rescaling are folded into gain and offset, the normaliser's clip into low and high. Infinities
  saturate; NaN is refused before;
- other activations between integer layers are tables of 1,024 entries over the range in which they change;
- an LSTM or GRU is two products to float and one step of its cell on floats, in which ``tanh`` is
  :func:`~rlquant.deploy.head.tanh32`, ``sigmoid(x)`` is ``tanh(x / 2) / 2 + 1/2``, and each operation is rounded.

Biases are float32, not int32 in units of the accumulator: with few bits that unit is as large as the biases.
Float operations are exact up to the order of summation.

Sources: Jacob et al. 2018 (arXiv:1712.05877), section 2; the rounding is that of ONNX's QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.head import ProgramHead
from rlquant.errors import InputError

__all__ = [
    "CELL_KINDS",
    "TABLE_BITS",
    "Activate",
    "Affine",
    "Buffer",
    "Conv2d",
    "Gates",
    "Linear",
    "OneHot",
    "Op",
    "Program",
    "Table",
    "Weight",
]

TABLE_BITS = 10

CELL_KINDS = {"LSTM": (4, 2), "GRU": (3, 1)}
"""Gates of a cell, and vectors in its memory: hidden state and cell state, or the hidden state alone."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Buffer:
    """Numbers between operations: ``bits`` of 32 is float32, fewer are unsigned integers on a grid."""

    size: int
    bits: int = 32

    @property
    def is_float(self) -> bool:
        """Whether it holds float32."""
        return self.bits == 32


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight matrix ``[rows, columns]``, a convolution's flattened.

    Attributes:
        rows, columns: its shape.
        bits: of an integer; 32 for float32.
        codes: float32 ``[rows, columns]``, or uint8: two's complement codes packed in row-major order, the
            first in the lowest bits.
    """

    rows: int
    columns: int
    bits: int
    codes: NDArray[Any]

    @property
    def values(self) -> NDArray[Any]:
        """int32 (or float32) ``[rows, columns]``; unpacked anew each time, as nothing keeps them unpacked."""
        if self.bits == 32:
            return self.codes
        count, half = self.rows * self.columns, 1 << (self.bits - 1)
        if 8 % self.bits == 0:  # each byte stands for the same few codes wherever it is
            fields = np.arange(256)[:, None] >> np.arange(0, 8, self.bits) & (2**self.bits - 1)
            signed = ((fields ^ half) - half).astype(np.int8)
            unpacked: Ints = signed.take(self.codes, axis=0).ravel()[:count].astype(np.int32)
            return unpacked.reshape(self.rows, self.columns)
        stream = np.unpackbits(self.codes, bitorder="little")[: count * self.bits]
        places = 1 << np.arange(self.bits, dtype=np.int32)
        unsigned = stream.reshape(count, self.bits).astype(np.int32) @ places
        return ((unsigned ^ half) - half).reshape(self.rows, self.columns).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Affine:
    """``clamp(x * gain + offset, low, high)``, rounded half to even where the target is a grid.

    The arrays are float32 of the result's size, or of size 1. ``start`` is where in the target it writes;
    ``order`` (int32) says which number of the source each one of the result is, None for the same.
    """

    source: int
    target: int
    gain: Floats
    offset: Floats
    low: Floats
    high: Floats
    start: int = 0
    order: Ints | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """A matrix product.

    Attributes:
        weight: of integers where the source is a grid.
        bias: float32 ``[rows]``, in steps of an integer target.
        gain: float32 ``[rows, groups]``: of an accumulator, in steps of an integer target; for a float source
            the scales of the weight (ones for float32).
        group: columns of a group; the last one may be shorter.
        source_zero: the zero point of an integer source.
        zero, low, high: of an integer target.
    """

    source: int
    target: int
    weight: Weight
    bias: Floats
    gain: Floats
    group: int
    source_zero: int = 0
    zero: int = 0
    low: int = 0
    high: int = 0
    start: int = 0

    @cached_property
    def corrections(self) -> Ints:
        """What the zero point of the source adds to each accumulator: int32 ``[rows, groups]``."""
        starts = np.arange(0, self.weight.columns, self.group)
        sums = np.add.reduceat(self.weight.values.astype(np.int64), starts, axis=1)
        return (-self.source_zero * sums).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Conv2d(Linear):
    """A convolution: the matrix ``[out, in / groups * kh * kw]`` on patches of ``[channels, height, width]``.

    Attributes:
        image: channels, height and width of the source.
        kernel, stride, padding, dilation: ``(vertical, horizontal)``.
        blocks: PyTorch's ``groups``.

    Outside of the image stands ``source_zero``.
    """

    image: tuple[int, int, int] = (0, 0, 0)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    blocks: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        height, width = (
            (self.image[i + 1] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(2)
        )
        return height, width


@dataclass(frozen=True, eq=False)
class Table:
    """``table[q]`` for each integer: uint16 ``[1024]``."""

    source: int
    target: int
    table: NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Activate:
    """An activation on float32, by torch's name of it in :data:`~rlquant.deploy.floats.ACTIVATIONS`."""

    source: int
    target: int
    kind: str


@dataclass(frozen=True, eq=False)
class OneHot:
    """``1.0 if x[order[k]] == value[k] else 0.0`` for each ``k``: int32 and float32 arrays of the result's size."""

    source: int
    target: int
    order: Ints
    value: Floats


@dataclass(frozen=True, eq=False)
class Gates:
    """One step of an LSTM's or GRU's cell; equations and order of the gates are torch's.

    Attributes:
        source: float32: the gates' shares from the input, then those from the hidden state.
        memory: float32, the memory before the step: hidden state, then an LSTM's cell state.
        target: float32, the memory after the step.
        kind: of :data:`CELL_KINDS`.
    """

    source: int
    target: int
    memory: int
    kind: str


Op = Affine | Linear | Conv2d | Table | Activate | OneHot | Gates


@dataclass(frozen=True, eq=False)
class Program:
    """A policy.

    Attributes:
        buffers: the first ones are the inputs, then what :attr:`states` remembers.
        inputs: for each key of the observation (``""`` where it is no Dict) its shape, as the environment
            shows it, frames stacked; buffer ``i`` is the ``i``-th of them, float32, flattened.
        ops: in order.
        head: from the last buffer, float32, to the action.
        name: for reports: what was compiled.
        states: pairs of a float32 buffer that holds zeros when an episode begins, and the buffer whose numbers
            it takes over after each step.
    """

    buffers: tuple[Buffer, ...]
    inputs: Mapping[str, tuple[int, ...]]
    ops: tuple[Op, ...]
    head: ProgramHead
    name: str = ""
    states: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for op in self.ops:
            if isinstance(op, Linear) and not self.buffers[op.source].is_float:
                _check_accumulator(op, self.buffers[op.source].bits)

    @property
    def output(self) -> int:
        """Index of the head's outputs."""
        return len(self.buffers) - 1

    @property
    def state_size(self) -> int:
        """How many float32 numbers it remembers from step to step."""
        return sum(self.buffers[state].size for state, _ in self.states)

    @property
    def is_integer(self) -> bool:
        """Whether every matrix product is one of integers."""
        return all(not self.buffers[op.source].is_float for op in self.ops if isinstance(op, Linear))

    @property
    def nbytes(self) -> int:
        """Bytes of all constants."""
        arrays = [value for op in self.ops for value in vars(op).values() if isinstance(value, np.ndarray)]
        codes = [op.weight.codes for op in self.ops if isinstance(op, Linear)]
        return sum(int(array.nbytes) for array in arrays + codes)


def _check_accumulator(op: Linear, bits: int) -> None:
    """The largest sum that any input can give must fit into int32."""
    if op.weight.columns * 2 ** (op.weight.bits - 1) * (2**bits - 1) < 2**31:
        return  # whatever the weights are
    largest = int(np.abs(op.weight.values.astype(np.int64)).sum(axis=1).max(initial=0)) * (2**bits - 1)
    if largest >= 2**31:
        raise InputError(
            f"a layer of {op.weight.columns} inputs of {bits} bits and {op.weight.bits}-bit weights could overflow a "
            "32-bit accumulator: take fewer bits"
        )
