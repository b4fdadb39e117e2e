"""A program as an ONNX model whose integers are exact.

Inputs are float32 ``[batch, *shape]`` for each key of the observation, as the environment shows it
(``observation`` where it is no Dict). ``outputs`` are the head's outputs, ``action`` the action. A policy with
memory reads ``state`` ``[batch, state_size]``, zeros when an episode begins, and gives ``next_state``. Every
integer operation is written out as :mod:`~rlquant.deploy.program` defines it - ``MatMulInteger``, ``Cast``, ``Mul``,
``Add``, ``Round``, ``Clip`` - so that a conforming runtime gives the reference's outputs to the bit. The
QuantizeLinear/DequantizeLinear form is not offered: runtimes fuse it into products with integer biases and a
multiplier of their own, which round otherwise.

Float products, and activations on floats other than ReLU and tanh, agree up to rounding only. A program with
float products takes ONNX's own Tanh, one node instead of twenty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlquant.deploy.head import TANH_DENOMINATOR, TANH_LIMIT, TANH_NUMERATOR
from rlquant.deploy.onnx_nodes import Graph
from rlquant.deploy.onnx_products import float_product, integer_product
from rlquant.deploy.program import (
    CELL_KINDS,
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
)
from rlquant.errors import InputError

__all__ = ["ACTION", "MASKS", "NEXT_STATE", "OUTPUTS", "STATE", "build_model", "input_names"]

OUTPUTS, ACTION, MASKS = "outputs", "action", "masks"
STATE, NEXT_STATE = "state", "next_state"


def input_names(program: Program) -> dict[str, str]:
    """The model's input for each key of the observation."""
    taken = (OUTPUTS, ACTION, MASKS, STATE, NEXT_STATE, "")
    return {key: f"{key}_observation".strip("_") if key in taken else key for key in program.inputs}


def build_model(program: Program, *, masked: bool = False, metadata: Mapping[str, str] | None = None) -> Any:
    """The ``onnx.ModelProto`` of a program.

    Args:
        program: what to write.
        masked: with an input ``masks``, bool ``[batch, outputs]``, whose False forbids a choice.
        metadata: texts to store beside the program's name.

    Raises:
        InputError: onnx is not installed, or the program has an operation that ONNX lacks.
    """
    graph, names = Graph(), input_names(program)
    buffers = _Buffers(graph, program.buffers)
    for index, (key, shape) in enumerate(program.inputs.items()):
        name = names[key]
        buffers.write(index, 0, name if len(shape) == 1 else graph.reshape(name, program.buffers[index].size))
    sizes = [buffer.size for buffer in program.buffers[len(names) :][: len(program.states)]]
    for (state, _), part in zip(program.states, _split(graph, STATE, sizes), strict=True):
        buffers.write(state, 0, part)
    for op in program.ops:
        result = _apply(graph, op, buffers, program)
        buffers.write(op.target, getattr(op, "start", 0), result)
    outputs = graph.node("Identity", buffers.read(program.output), name=OUTPUTS)
    action, described = _head(graph, program, outputs, masked)
    graph.node("Identity", action, name=ACTION)
    inputs: dict[str, Any] = {names[key]: (np.float32, shape) for key, shape in program.inputs.items()}
    if masked:
        inputs[MASKS] = (np.bool_, (program.head.outputs,))
    shapes: dict[str, Any] = {OUTPUTS: (np.float32, (program.head.outputs,)), ACTION: described}
    if program.states:
        kept = [buffers.read(after) for _, after in program.states]
        graph.node("Concat", *kept, axis=1, name=NEXT_STATE)
        inputs[STATE] = shapes[NEXT_STATE] = (np.float32, (program.state_size,))
    return graph.model(inputs, shapes, {"program": program.name, **(metadata or {})})


class _Buffers:
    """The tensors of which each buffer consists, by where they start in it."""

    def __init__(self, graph: Graph, buffers: tuple[Buffer, ...]) -> None:
        self.graph = graph
        self.parts: list[dict[int, str]] = [{} for _ in buffers]

    def write(self, index: int, start: int, name: str) -> None:
        self.parts[index][start] = name

    def read(self, index: int) -> str:
        parts = [name for _, name in sorted(self.parts[index].items())]
        if len(parts) > 1:
            self.parts[index] = {0: self.graph.node("Concat", *parts, axis=1)}
            return self.read(index)
        return parts[0]


def _apply(graph: Graph, op: Op, buffers: _Buffers, program: Program) -> str:
    x = buffers.read(op.source)
    if isinstance(op, Gates):
        return _step(graph, op, x, buffers.read(op.memory), program)
    source, target = program.buffers[op.source], program.buffers[op.target]
    if isinstance(op, Affine):
        return _affine(graph, op, x, source, target)
    if isinstance(op, OneHot):
        chosen = graph.node("Gather", x, graph.constant(op.order, np.int32), axis=1)
        return graph.cast(graph.node("Equal", chosen, graph.constant(op.value, np.float32)), np.float32)
    if isinstance(op, Table):
        table = graph.constant(op.table, np.int32 if target.bits > 8 else np.uint8)
        return graph.node("Gather", table, x if source.bits > 8 else graph.cast(x, np.int32), axis=0)
    if isinstance(op, Activate):
        return _activate(graph, op.kind, x, exact=program.is_integer)
    return _linear(graph, op, x, source, target)


def _split(graph: Graph, x: str, sizes: Sequence[int]) -> list[str]:
    """``x`` cut along its columns."""
    if len(sizes) < 2:
        return [x] * len(sizes)
    names = [graph.fresh("Split") for _ in sizes]
    return graph.nodes("Split", [x, graph.constant(sizes, np.int64)], names, axis=1)


def _step(graph: Graph, op: Gates, shares: str, memory: str, program: Program) -> str:
    """See :class:`~rlquant.deploy.program.Gates`."""
    gates, vectors = CELL_KINDS[op.kind]
    hidden = program.buffers[op.target].size // vectors

    def tanh(x: str) -> str:
        return _activate(graph, "Tanh", x, exact=program.is_integer)

    def sigmoid(x: str) -> str:
        if not program.is_integer:
            return graph.node("Sigmoid", x)
        half = graph.constant(0.5, np.float32)
        return graph.node("Add", graph.node("Mul", half, tanh(graph.node("Mul", half, x))), half)

    def both(operation: str, x: str, y: str) -> str:
        return graph.node(operation, x, y)

    parts = _split(graph, shares, [hidden] * (2 * gates))
    from_input, from_hidden = parts[:gates], parts[gates:]
    held = _split(graph, memory, [hidden] * vectors)
    sums = [both("Add", x, y) for x, y in zip(from_input, from_hidden, strict=True)]
    if op.kind == "LSTM":
        i, f, g, o = sums
        cell = both("Add", both("Mul", sigmoid(f), held[1]), both("Mul", sigmoid(i), tanh(g)))
        return graph.node("Concat", both("Mul", sigmoid(o), tanh(cell)), cell, axis=1)
    reset, update = map(sigmoid, sums[:2])
    new = tanh(both("Add", from_input[2], both("Mul", reset, from_hidden[2])))
    rest = both("Sub", graph.constant(1, np.float32), update)
    return both("Add", both("Mul", rest, new), both("Mul", update, held[0]))


def _linear(graph: Graph, op: Linear, x: str, source: Buffer, target: Buffer) -> str:
    y = float_product(graph, op, x) if source.is_float else integer_product(graph, op, x, source.bits)
    if not target.is_float:
        y = graph.node("Round", y)
        if op.zero:
            y = graph.node("Add", y, graph.constant(op.zero, np.float32))
        y = _to_grid(graph, _clamp(graph, y, np.float32(op.low), np.float32(op.high)), target)
    return graph.node("Flatten", y, axis=1) if isinstance(op, Conv2d) else y


def _affine(graph: Graph, op: Affine, x: str, source: Buffer, target: Buffer) -> str:
    if op.order is not None:
        x = graph.node("Gather", x, graph.constant(op.order, np.int32), axis=1)
    if not source.is_float:
        x = graph.cast(x, np.float32)
    x = graph.node("Mul", x, graph.constant(op.gain, np.float32))
    x = graph.node("Add", x, graph.constant(op.offset, np.float32))
    x = _clamp(graph, x, op.low, op.high)
    return x if target.is_float else _to_grid(graph, graph.node("Round", x), target)


def _clamp(graph: Graph, x: str, low: Any, high: Any) -> str:
    if np.isinf(low).all() and np.isinf(high).all():
        return x
    if np.size(low) == 1 and np.size(high) == 1:
        bounds = [graph.constant(np.reshape(bound, ()), np.float32) for bound in (low, high)]
        return graph.node("Clip", x, *bounds)
    return graph.node(
        "Min", graph.node("Max", x, graph.constant(low, np.float32)), graph.constant(high, np.float32)
    )


def _to_grid(graph: Graph, x: str, target: Buffer) -> str:
    return graph.cast(x, np.uint8 if target.bits <= 8 else np.int32)


_ONNX_ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ReLU": ("Relu", {}),
    "Sigmoid": ("Sigmoid", {}),
    "ELU": ("Elu", {}),
    "LeakyReLU": ("LeakyRelu", {"alpha": 0.01}),
    "GELU": ("Gelu", {}),
    "SELU": ("Selu", {}),
    "Softplus": ("Softplus", {}),
    "Mish": ("Mish", {}),
    "Softsign": ("Softsign", {}),
    "Hardswish": ("HardSwish", {}),
}


def _activate(graph: Graph, kind: str, x: str, *, exact: bool) -> str:
    if kind == "Tanh":
        return _tanh(graph, x) if exact else graph.node("Tanh", x)
    if kind == "SiLU":
        return graph.node("Mul", x, graph.node("Sigmoid", x))
    if kind == "ReLU6":
        return _clamp(graph, x, np.float32(0), np.float32(6))
    if kind not in _ONNX_ACTIVATIONS:
        raise InputError(
            f"the activation {kind} has no ONNX form; the runtimes reference and torch can run it"
        )
    name, attributes = _ONNX_ACTIVATIONS[kind]
    return graph.node(name, x, **attributes)


def _tanh(graph: Graph, x: str) -> str:
    """:func:`~rlquant.deploy.head.tanh32`, operation for operation."""
    x = _clamp(graph, x, -TANH_LIMIT, TANH_LIMIT)
    square = graph.node("Mul", x, x)
    numerator, denominator = (
        _horner(graph, square, coefficients) for coefficients in (TANH_NUMERATOR, TANH_DENOMINATOR)
    )
    return graph.node("Div", graph.node("Mul", numerator, x), denominator)


def _horner(graph: Graph, x: str, coefficients: tuple[Any, ...]) -> str:
    total = graph.constant(coefficients[0], np.float32)
    for coefficient in coefficients[1:]:
        total = graph.node("Add", graph.node("Mul", total, x), graph.constant(coefficient, np.float32))
    return total


def _head(graph: Graph, program: Program, y: str, masked: bool) -> tuple[str, tuple[Any, tuple[int, ...]]]:
    """The action's name, and its dtype and shape."""
    head = program.head
    if masked:
        y = graph.node("Where", MASKS, y, graph.constant(-np.inf, np.float32))
    if head.kind == "argmax":
        return graph.node("ArgMax", y, axis=1, keepdims=0), (np.int64, ())
    if head.kind == "multi_argmax":
        parts = _split(graph, y, head.branches)
        choices = [graph.node("ArgMax", part, axis=1, keepdims=1) for part in parts]
        return graph.node("Concat", *choices, axis=1), (np.int64, (len(head.branches),))
    if head.kind == "threshold":
        positive = graph.cast(graph.node("Greater", y, graph.constant(0, np.float32)), np.int8)
        return graph.reshape(positive, *head.shape), (np.int8, head.shape)
    assert head.low is not None
    assert head.high is not None
    if head.kind == "clip":
        y = _clamp(graph, y, head.low, head.high)
    else:
        y = _activate(graph, "Tanh", y, exact=program.is_integer) if head.kind == "tanh" else y
        half = graph.node(
            "Mul", graph.constant(0.5, np.float32), graph.node("Add", y, graph.constant(1, np.float32))
        )
        spread = graph.node("Mul", half, graph.constant(head.high - head.low, np.float32))
        y = graph.node("Add", graph.constant(head.low, np.float32), spread)
    return graph.reshape(y, *head.shape), (np.float32, head.shape)
