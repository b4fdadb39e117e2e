"""Matrix products and convolutions of a program in ONNX.

Integer products are ``MatMulInteger`` and ``ConvInteger``. Their weights are stored as uint8 with a zero point
of 128: products of uint8 and int8 saturate at 16 bits on x86 CPUs without VNNI, those of uint8 and uint8 are
exact everywhere. Weights of fewer than 8 bits take a byte each in the file as well. Sources and weights of
more than 8 bits are split into bytes.

Float products of integer weights (weight-only schemes) store the integers and scale them in the graph; a
runtime that folds constants does so once, when it loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.onnx_nodes import Graph
from rlquant.deploy.program import Conv2d, Linear

__all__ = ["float_product", "integer_product"]

Array = NDArray[Any]


@dataclass(frozen=True)
class _Bytes:
    """One byte of each number: the number is the sum of ``factor * (value - zero)``."""

    factor: int
    value: Any  # the name of a uint8 tensor, or a uint8 array of weights
    zero: int


def integer_product(graph: Graph, op: Linear, x: str, bits: int) -> str:
    """float32 ``[batch, rows]`` or ``[batch, rows, height, width]`` before rounding.

    Args:
        graph: where the nodes go.
        op: a linear or convolution.
        x: integers ``[batch, size]``, uint8 up to 8 bits and int32 above.
        bits: of ``x``.
    """
    if isinstance(op, Conv2d):
        x = graph.reshape(x, *op.image)
    sources = [_grouped(graph, op, source) for source in _bytes_of_source(graph, x, bits, op.source_zero)]
    total = ""
    for index in range(op.gain.shape[1]):
        accumulator = _accumulator(graph, op, [groups[index] for groups in sources], index)
        part = graph.node("Mul", graph.cast(accumulator, np.float32), _per_row(graph, op, op.gain[:, index]))
        total = graph.node("Add", total, part) if total else part
    return graph.node("Add", total, _per_row(graph, op, op.bias))


def float_product(graph: Graph, op: Linear, x: str) -> str:
    """As :func:`integer_product`, of float32 ``x``."""
    weight = _float_weight(graph, op)
    bias = graph.constant(op.bias, np.float32)
    if not isinstance(op, Conv2d):
        return graph.node("Gemm", x, weight, bias, transB=1)
    shape = graph.constant((op.weight.rows, -1, *op.kernel), np.int64)
    image = graph.reshape(x, *op.image)
    return graph.node("Conv", image, graph.node("Reshape", weight, shape), bias, **_geometry(op))


def _bytes_of_source(graph: Graph, x: str, bits: int, zero: int) -> list[_Bytes]:
    if bits <= 8:
        return [_Bytes(1, x, zero)]
    byte = graph.constant(256, np.int32)
    high = graph.node("Div", x, byte)
    low = graph.node("Sub", x, graph.node("Mul", high, byte))
    return [
        _Bytes(256, graph.cast(high, np.uint8), zero >> 8),
        _Bytes(1, graph.cast(low, np.uint8), zero & 255),
    ]


def _bytes_of_weight(codes: Array, bits: int) -> list[_Bytes]:
    if bits <= 8:
        return [_Bytes(1, (codes + 128).astype(np.uint8), 128)]
    high, low = codes >> 8, codes & 255
    return [_Bytes(256, (high + 128).astype(np.uint8), 128), _Bytes(1, low.astype(np.uint8), 0)]


def _grouped(graph: Graph, op: Linear, source: _Bytes) -> list[_Bytes]:
    """What each group of columns reads."""
    groups = op.gain.shape[1]
    if groups == 1:
        return [source]
    if isinstance(op, Conv2d):
        names = [_sliced(graph, source.value, _channels(op, group)) for group in range(groups)]
    else:
        edges = [*range(0, op.weight.columns, op.group), op.weight.columns]
        names = [f"{source.value}/{op.target}.{op.start}/{edge}" for edge in edges[:-1]]
        graph.nodes("Split", [source.value, graph.constant(np.diff(edges), np.int64)], names, axis=1)
    return [_Bytes(source.factor, name, source.zero) for name in names]


def _channels(op: Conv2d, group: int) -> slice:
    """The channels of a group of columns; all where blocks of rows see channels of their own."""
    if op.blocks > 1:
        return slice(0, op.image[0])
    taps = op.kernel[0] * op.kernel[1]
    end = min((group + 1) * op.group, op.weight.columns)
    return slice(group * op.group // taps, -(-end // taps))


def _sliced(graph: Graph, x: str, channels: slice) -> str:
    bounds = [graph.constant([bound], np.int64) for bound in (channels.start, channels.stop, 1)]
    return graph.node("Slice", x, *bounds)


def _codes(op: Linear, group: int) -> Array:
    """int32 ``[rows, columns]`` of a group; of a convolution its channels, with zeros beside the group."""
    columns = slice(group * op.group, (group + 1) * op.group)
    if not isinstance(op, Conv2d):
        return op.weight.values[:, columns]
    channels, taps = _channels(op, group), op.kernel[0] * op.kernel[1]
    kept = np.zeros_like(op.weight.values)
    kept[:, columns] = op.weight.values[:, columns]
    return kept if op.blocks > 1 else kept[:, channels.start * taps : channels.stop * taps]


def _accumulator(graph: Graph, op: Linear, sources: list[_Bytes], group: int) -> str:
    """int32, of the columns of one group."""
    total = ""
    for source in sources:
        for weight in _bytes_of_weight(_codes(op, group), op.weight.bits):
            part = _product_of_bytes(graph, op, source, weight)
            factor = source.factor * weight.factor
            if factor != 1:
                part = graph.node("Mul", part, graph.constant(factor, np.int32))
            total = graph.node("Add", total, part) if total else part
    return total


def _product_of_bytes(graph: Graph, op: Linear, source: _Bytes, weight: _Bytes) -> str:
    zeros = [graph.constant(zero, np.uint8) for zero in (source.zero, weight.zero)]
    if isinstance(op, Conv2d):
        kernel = graph.constant(weight.value.reshape(op.weight.rows, -1, *op.kernel), np.uint8)
        return graph.node("ConvInteger", source.value, kernel, *zeros, **_geometry(op))
    return graph.node("MatMulInteger", source.value, graph.constant(weight.value.T, np.uint8), *zeros)


def _float_weight(graph: Graph, op: Linear) -> str:
    """float32 ``[rows, columns]``."""
    if op.weight.bits == 32:
        return graph.constant(op.weight.values, np.float32)
    codes = graph.constant(op.weight.values, np.int8 if op.weight.bits <= 8 else np.int16)
    scales = graph.constant(op.gain, np.float32)
    if op.gain.shape[1] > 1:
        group_of_column = graph.constant(np.arange(op.weight.columns) // op.group, np.int64)
        scales = graph.node("Gather", scales, group_of_column, axis=1)
    return graph.node("Mul", graph.cast(codes, np.float32), scales)


def _per_row(graph: Graph, op: Linear, values: Array) -> str:
    shaped = values.reshape(-1, 1, 1) if isinstance(op, Conv2d) else values
    return graph.constant(shaped, np.float32)


def _geometry(op: Conv2d) -> dict[str, Any]:
    return {
        "kernel_shape": op.kernel,
        "strides": op.stride,
        "pads": (*op.padding, *op.padding),
        "dilations": op.dilation,
        "group": op.blocks,
    }
