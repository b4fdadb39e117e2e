"""The NumPy interpreter: slow, plain, and what every other runtime has to agree with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.floats import ACTIVATIONS
from rlquant.deploy.head import sigmoid32, tanh32
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

__all__ = ["run"]

Array = NDArray[Any]


def run(
    program: Program, observations: dict[str, Array], states: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Head outputs for a batch.

    Args:
        program: what to run.
        observations: ``[n, *shape]`` by key, finite or infinite but not NaN.
        states: float32 ``[n, state_size]``, replaced in place; None for zeros that nobody needs afterwards.

    Returns:
        float32 ``[n, outputs]``.
    """
    rows = len(next(iter(observations.values())))
    buffers: list[Array] = [
        np.zeros((rows, buffer.size), np.float32 if buffer.is_float else np.int32)
        for buffer in program.buffers
    ]
    for index, key in enumerate(program.inputs):
        buffers[index] = observations[key].reshape(rows, -1).astype(np.float32)
    if states is not None:
        _recall(program, buffers, states)
    for op in program.ops:
        result = _apply(program, op, buffers)
        start = getattr(op, "start", 0)
        buffers[op.target][:, start : start + result.shape[1]] = result
    if states is not None and program.states:
        states[...] = np.concatenate([buffers[after] for _, after in program.states], axis=1)
    return buffers[-1]


def _recall(program: Program, buffers: list[Array], states: Array) -> None:
    start = 0
    for state, _ in program.states:
        end = start + program.buffers[state].size
        buffers[state], start = states[:, start:end], end


def _step(kind: str, shares: Array, memory: Array) -> Array:
    """Memory float32 ``[n, vectors * hidden]`` after one step of a cell."""
    gates, vectors = CELL_KINDS[kind]
    hidden, *cell = np.split(memory, vectors, axis=1)
    from_input, from_hidden = (np.split(x, gates, axis=1) for x in np.split(shares, 2, axis=1))
    if kind == "LSTM":
        i, f, g, o = (x + y for x, y in zip(from_input, from_hidden, strict=True))
        after = sigmoid32(f) * cell[0] + sigmoid32(i) * tanh32(g)
        return np.concatenate([sigmoid32(o) * tanh32(after), after], axis=1)
    reset, update = (sigmoid32(x + y) for x, y in zip(from_input[:2], from_hidden[:2], strict=True))
    new = tanh32(from_input[2] + reset * from_hidden[2])
    after_step: Array = (np.float32(1.0) - update) * new + update * hidden
    return after_step


def _apply(program: Program, op: Op, buffers: list[Array]) -> Array:
    x, from_float = buffers[op.source], program.buffers[op.source].is_float
    to_float = program.buffers[op.target].is_float
    if isinstance(op, Gates):
        return _step(op.kind, x, buffers[op.memory])
    if isinstance(op, Affine):
        return _affine(op, x, to_float)
    if isinstance(op, OneHot):
        hot: Array = (x[:, op.order] == op.value).astype(np.float32)
        return hot
    if isinstance(op, Table):
        entries: Array = op.table[x].astype(np.int32)
        return entries
    if isinstance(op, Activate):
        return tanh32(x) if op.kind == "Tanh" else ACTIVATIONS[op.kind](x).astype(np.float32)
    patches = (
        _patches(op, x) if isinstance(op, Conv2d) else x[:, None, None, :]
    )  # [n, blocks, positions, columns]
    product = _float_product if from_float else _integer_product
    result = product(op, patches)  # [n, positions, rows]
    if not to_float:
        result = np.clip(np.rint(result) + np.float32(op.zero), op.low, op.high).astype(np.int32)
    flat: Array = result.transpose(0, 2, 1).reshape(len(x), -1)
    return flat


def _affine(op: Affine, x: Array, to_float: bool) -> Array:
    with np.errstate(over="ignore"):
        x = x if op.order is None else x[:, op.order]
        y = np.clip(x.astype(np.float32) * op.gain + op.offset, op.low, op.high)
    result: Array = y if to_float else np.rint(y).astype(np.int32)
    return result


def _integer_product(op: Linear, patches: Array) -> Array:
    """float32 ``[n, positions, rows]`` of integer patches, before rounding."""
    weights, patches = op.weight.values.astype(np.float64), patches.astype(np.float64)  # exact below 2**53
    total: Any = None
    for index in range(op.gain.shape[1]):
        columns = slice(index * op.group, (index + 1) * op.group)
        sums = _blockwise(patches[..., columns], weights[:, columns]) + op.corrections[:, index]
        part = sums.astype(np.float32) * op.gain[:, index]
        total = part if total is None else total + part
    result: Array = total + op.bias
    return result


def _float_product(op: Linear, patches: Array) -> Array:
    scales = np.repeat(op.gain, op.group, axis=1)[:, : op.weight.columns]
    weights = op.weight.values.astype(np.float32) * scales
    result: Array = _blockwise(patches, weights).astype(np.float32) + op.bias
    return result


def _blockwise(patches: Array, weights: Array) -> Array:
    """``[n, positions, rows]``: each block of output rows sees its own block of patches."""
    blocks = patches.shape[1]
    parts = [patches[:, i] @ rows.T for i, rows in enumerate(np.split(weights, blocks))]
    return np.concatenate(parts, axis=2)


def _patches(op: Conv2d, x: Array) -> Array:
    """``[n, blocks, positions, columns]`` of images ``[n, channels * height * width]``."""
    (channels, height, width), (up, left) = op.image, op.padding
    padded = np.full((len(x), channels, height + 2 * up, width + 2 * left), op.source_zero, x.dtype)
    padded[:, :, up : up + height, left : left + width] = x.reshape(len(x), channels, height, width)
    rows, columns = op.out_size
    taps = [
        padded[
            :,
            :,
            i * op.dilation[0] : i * op.dilation[0] + rows * op.stride[0] : op.stride[0],
            j * op.dilation[1] : j * op.dilation[1] + columns * op.stride[1] : op.stride[1],
        ][:, :, :rows, :columns]
        for i in range(op.kernel[0])
        for j in range(op.kernel[1])
    ]
    stacked = np.stack(taps, axis=2)  # [n, channels, taps, rows, columns]
    blocked = stacked.reshape(len(x), op.blocks, -1, rows * columns)
    return blocked.transpose(0, 1, 3, 2)
