"""What a program from a file has to satisfy before anything is computed from it or allocated for it.

Runtimes rely on it: the C and GPU ones read and write their buffers without looking.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlquant.deploy.head import HEAD_KINDS, ProgramHead
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
    Table,
)
from rlquant.errors import InputError, unknown_name

__all__ = ["check_parts"]

_MAX_NUMBERS = 2**26  # in all buffers together
_MAX_COUNT = 4096  # buffers, and operations


def check_parts(
    buffers: Sequence[Buffer],
    inputs: Mapping[str, tuple[int, ...]],
    ops: Sequence[Op],
    head: ProgramHead,
    states: Sequence[tuple[int, int]] = (),
) -> None:
    """Check what a :class:`~rlquant.deploy.program.Program` is made of.

    Every number of a buffer is written once, before it is read; all indices, sizes, types and ranges fit.

    Raises:
        InputError: they do not; the message says which operation and what.
    """
    _check_count("buffers", len(buffers))
    _check_count("operations", len(ops))
    for buffer in buffers:
        _integer(buffer.size, 1, _MAX_NUMBERS, "the size of a buffer")
        _bits(buffer.bits, 1, "the bits of a buffer")
    if sum(buffer.size for buffer in buffers) > _MAX_NUMBERS:
        raise InputError(f"the buffers hold more than {_MAX_NUMBERS:,} numbers")
    filled = _Filled(buffers, inputs, [state for state, _ in states])
    for index, op in enumerate(ops):
        try:
            _check_op(op, filled)
        except InputError as error:
            raise InputError(f"operation {index} ({type(op).__name__}): {error}") from None
    for state, after in states:
        _integer(after, filled.given, len(buffers) - 1, "the buffer that is remembered")
        fits = buffers[after].is_float and buffers[after].size == buffers[state].size
        _require(fits, f"buffer {after} does not fit the memory {state}")
        filled.check_read(after)
    last = len(buffers) - 1
    filled.check_read(last)
    _require(buffers[last].is_float, "the last buffer is not float32")
    _check_head(head, buffers[last].size)


class _Filled:
    """Which parts of the buffers have been written."""

    def __init__(
        self, buffers: Sequence[Buffer], inputs: Mapping[str, tuple[int, ...]], states: Sequence[int]
    ) -> None:
        self.buffers = buffers
        self.given = len(inputs) + len(states)
        self.parts: list[list[tuple[int, int]]] = [[] for _ in buffers]
        _require(0 < len(inputs) <= len(buffers), "there is no input, or no buffer for one")
        for index, shape in enumerate(inputs.values()):
            for length in shape:
                _integer(length, 1, _MAX_NUMBERS, "a length of an input's shape")
            fits = buffers[index].is_float and math.prod(shape) == buffers[index].size
            _require(fits, f"buffer {index} does not fit the input {list(shape)}")
            self.parts[index] = [(0, buffers[index].size)]
        _require(self.given <= len(buffers), "there is no buffer for what is remembered")
        for index, state in enumerate(states, len(inputs)):
            _require(state == index, f"the memory {state!r} is not buffer {index}, after the inputs")
            _require(buffers[index].is_float, f"the memory {index} is not float32")
            self.parts[index] = [(0, buffers[index].size)]

    def check_read(self, index: int) -> None:
        end = 0
        for start, stop in sorted(self.parts[index]):
            _require(start == end, f"buffer {index} is read before it is written, or written twice")
            end = stop
        _require(end == self.buffers[index].size, f"buffer {index} is read before it is written")

    def write(self, index: int, start: int, size: int) -> None:
        _require(index >= self.given, f"buffer {index} is an input")
        room = self.buffers[index].size - size
        _require(room >= 0, f"its {size} numbers do not fit into buffer {index}")
        _integer(start, 0, room, "the start in the target")
        self.parts[index].append((start, start + size))


def _check_op(op: Op, filled: _Filled) -> None:
    buffers = filled.buffers
    for name in ("source", "target"):
        _integer(getattr(op, name), 0, len(buffers) - 1, f"the {name}")
    _require(not filled.parts[op.target] or hasattr(op, "start"), "the target was written before")
    filled.check_read(op.source)
    source, target = buffers[op.source], buffers[op.target]
    if isinstance(op, Affine):
        size = _check_affine(op, source, target)
    elif isinstance(op, Linear):
        size = _check_linear(op, source, target)
    elif isinstance(op, OneHot):
        size = _check_one_hot(op, source, target)
    elif isinstance(op, Gates):
        _integer(op.memory, 0, len(buffers) - 1, "the memory")
        filled.check_read(op.memory)
        size = _check_gates(op, source, target, buffers[op.memory])
    else:
        size = source.size
        _require(target.size == size, "the source and the target differ in size")
        if isinstance(op, Table):
            _check_table(op, source, target)
        else:
            _check_activation(op, source, target)
    filled.write(op.target, getattr(op, "start", 0), size)


def _check_affine(op: Affine, source: Buffer, target: Buffer) -> int:
    size = source.size
    if op.order is not None:
        size = op.order.size
        _check_order(op.order, source)
    for name in ("gain", "offset", "low", "high"):
        array = getattr(op, name)
        _array(name, array, np.float32, (1,) if array.size == 1 else (size,))
        _require(not np.isnan(array).any(), f"{name} holds NaN")
    _require(bool(np.isfinite(op.gain).all() and np.isfinite(op.offset).all()), "gain or offset is infinite")
    _require(bool((op.gain > 0).all()), "a gain is not positive")  # 0 times infinity is no number
    _require(bool((op.low <= op.high).all()), "low is above high")
    if not target.is_float:
        fits = op.low.min() >= 0 and op.high.max() <= 2**target.bits - 1
        _require(bool(fits), f"the range exceeds the {target.bits} bits of the target")
    return size


def _check_order(order: Any, source: Buffer) -> None:
    _array("order", order, np.int32, (np.size(order),))
    inside = order.size > 0 and order.min() >= 0 and order.max() < source.size
    _require(bool(inside), "order names numbers that the source lacks")


def _check_one_hot(op: OneHot, source: Buffer, target: Buffer) -> int:
    _require(source.is_float and target.is_float, "one-hot codes are made of float32 and are float32")
    _check_order(op.order, source)
    _array("value", op.value, np.float32, op.order.shape)
    _finite("value", op.value)
    return op.order.size


def _check_gates(op: Gates, source: Buffer, target: Buffer, memory: Buffer) -> int:
    if op.kind not in CELL_KINDS:
        raise unknown_name("cell", str(op.kind), CELL_KINDS)
    _require(source.is_float and target.is_float and memory.is_float, "cells work on float32")
    gates, vectors = CELL_KINDS[op.kind]
    hidden = target.size // vectors
    fits = target.size == memory.size == vectors * hidden and source.size == 2 * gates * hidden
    _require(fits, f"the source, the memory and the target are not of one {op.kind}'s sizes")
    return target.size


def _check_linear(op: Linear, source: Buffer, target: Buffer) -> int:
    weight = op.weight
    _integer(weight.rows, 1, _MAX_NUMBERS, "the rows of the weight")
    _integer(weight.columns, 1, _MAX_NUMBERS, "the columns of the weight")
    _bits(weight.bits, 2, "the bits of the weight")
    count = weight.rows * weight.columns
    if weight.bits == 32:
        _require(source.is_float, "the weight is float32 and the source is not")
        _array("the weight", weight.codes, np.float32, (weight.rows, weight.columns))
        _finite("the weight", weight.codes)
    else:
        _array("the weight", weight.codes, np.uint8, (-(-count * weight.bits // 8),))
    _integer(op.group, 1, _MAX_NUMBERS, "the columns of a group")
    _array("bias", op.bias, np.float32, (weight.rows,))
    _array("gain", op.gain, np.float32, (weight.rows, -(-weight.columns // op.group)))
    _finite("bias", op.bias)
    _finite("gain", op.gain)
    _integer(op.source_zero, 0, 0 if source.is_float else 2**source.bits - 1, "the zero point of the source")
    top = 0 if target.is_float else 2**target.bits - 1
    _integer(op.zero, 0, top, "the zero point of the target")
    _integer(op.high, 0, top, "the highest code")
    _integer(op.low, 0, op.high, "the lowest code")
    if isinstance(op, Conv2d):
        return _check_geometry(op, source)
    _require(weight.columns == source.size, "the weight's columns are not the source's numbers")
    return weight.rows


def _check_geometry(op: Conv2d, source: Buffer) -> int:
    _integers(op.image, 3, 1, "the image")
    for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        _integers(getattr(op, name), 2, least, name)
    channels, rows = op.image[0], op.weight.rows
    _integer(op.blocks, 1, channels, "the groups of channels")
    _require(math.prod(op.image) == source.size, "the image is not of the source's size")
    divided = channels % op.blocks == 0 and rows % op.blocks == 0
    _require(divided, f"{channels} channels and {rows} rows do not split into {op.blocks}")
    columns = channels // op.blocks * math.prod(op.kernel)
    _require(columns == op.weight.columns, "the kernel is not of the weight's size")
    for padding, kernel, dilation in zip(op.padding, op.kernel, op.dilation, strict=True):
        _require(padding <= kernel * dilation, "the padding exceeds the kernel")
    _require(min(op.out_size) >= 1, "the kernel exceeds the image")
    return rows * math.prod(op.out_size)


def _check_table(op: Table, source: Buffer, target: Buffer) -> None:
    _array("table", op.table, np.uint16, (2**TABLE_BITS,))
    _require(source.bits <= TABLE_BITS, f"a table reads {TABLE_BITS} bits at most")
    _require(not target.is_float, "a table does not write float32")
    _require(int(op.table.max()) < 2**target.bits, f"the table exceeds the {target.bits} bits of the target")


def _check_activation(op: Activate, source: Buffer, target: Buffer) -> None:
    from rlquant.deploy.floats import ACTIVATIONS  # imports scipy, which integer programs do not need

    if op.kind not in ACTIVATIONS:
        raise unknown_name("activation", str(op.kind), ACTIVATIONS)
    _require(source.is_float and target.is_float, "activations work on float32")


def _check_head(head: ProgramHead, size: int) -> None:
    if head.kind not in HEAD_KINDS:
        raise unknown_name("head", str(head.kind), HEAD_KINDS)
    _integer(head.outputs, size, size, "the head's outputs")
    for length in (*head.branches, *head.shape):
        _integer(length, 1, _MAX_NUMBERS, "a length of the action")
    if head.kind == "multi_argmax":
        _require(sum(head.branches) == size, "the branches are not the outputs")
    elif head.kind != "argmax":
        _require(math.prod(head.shape) == size, "the action's shape is not of the outputs' size")
    if head.kind in ("clip", "tanh", "unscale"):
        for name, bound in (("low", head.low), ("high", head.high)):
            _array(f"the head's {name}", bound, np.float32, (size,))
            _require(bound is not None and not np.isnan(bound).any(), f"the head's {name} holds NaN")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InputError(otherwise)


def _check_count(what: str, count: int) -> None:
    _require(0 < count <= _MAX_COUNT, f"there are {count} {what}; 1 to {_MAX_COUNT} are possible")


def _integer(value: Any, low: int, high: int, what: str) -> None:
    _require(type(value) is int and low <= value <= high, f"{what} is {value!r}, not {low} to {high}")


def _integers(values: Any, count: int, low: int, what: str) -> None:
    _require(
        isinstance(values, tuple) and len(values) == count, f"{what} is {values!r}, not {count} integers"
    )
    for value in values:
        _integer(value, low, _MAX_NUMBERS, what)


def _bits(value: Any, least: int, what: str) -> None:
    fits = type(value) is int and (least <= value <= 16 or value == 32)
    _require(fits, f"{what} are {value!r}, not {least} to 16 or 32")


def _array(name: str, array: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    _require(isinstance(array, np.ndarray), f"{name} is missing")
    wanted = f"{np.dtype(dtype).name} {list(shape)}"
    given = f"{array.dtype.name} {list(array.shape)}"
    _require(array.dtype == dtype and array.shape == shape, f"{name} is {given}, not {wanted}")


def _finite(name: str, array: Any) -> None:
    _require(bool(np.isfinite(array).all()), f"{name} is not finite")
