"""From an agent to a program (:mod:`rlquant.deploy.program`).

A quantized layer rounds its input; a program rounds where a number is made, so each layer's result goes straight
to the grid of the next. The normaliser, the feature map of the observations and the channel scales of AWQ and
SmoothQuant disappear into the gains on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from rlquant.control.actor import FeatureMap
from rlquant.control.agent import Agent
from rlquant.control.head import Head
from rlquant.control.observation import ObservationPart
from rlquant.control.products import Grid, product_of, recurrent_product
from rlquant.deploy.floats import ACTIVATIONS
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import (
    CELL_KINDS,
    TABLE_BITS,
    Activate,
    Affine,
    Buffer,
    Gates,
    Linear,
    OneHot,
    Op,
    Program,
    Table,
)
from rlquant.errors import InputError

__all__ = ["compile_agent"]

Array = NDArray[Any]
_WIDE_BITS = 16  # of a table's results that are yet to be scaled channel by channel
_SCAN = np.linspace(-40.0, 40.0, 160_001)


def compile_agent(agent: Agent) -> Program:
    """The program of an agent, fp32 or quantized.

    Raises:
        InputError: the network has a layer, or the scheme a feature, that no program can do.
    """
    return _Compiler(agent).program()


@dataclass(frozen=True)
class _Mapped:
    """``clamp(x * gain + offset, low, high)`` of a float buffer, float64 ``[size]`` each, not computed yet."""

    buffer: int
    gain: Array
    offset: Array
    low: Array
    high: Array
    order: Array | None = None

    def then(self, gain: Array | float, offset: Array | float = 0.0) -> _Mapped:
        """Followed by another map of positive gain."""
        shifted, low, high = (x * gain + offset for x in (self.offset, self.low, self.high))
        return replace(self, gain=self.gain * gain, offset=shifted, low=low, high=high)

    def within(self, low: float, high: float) -> _Mapped:
        """Followed by a clamp."""
        return replace(self, low=np.maximum(self.low, low), high=np.minimum(self.high, high))

    @property
    def is_identity(self) -> bool:
        plain = (self.gain == 1).all() and (self.offset == 0).all() and self.order is None
        return bool(plain and np.isneginf(self.low).all() and np.isposinf(self.high).all())


@dataclass(frozen=True)
class _Pending:
    """A product whose target is not known yet, and the activation that follows it."""

    op: Linear
    size: int
    activation: str | None = None


_Value = _Mapped | _Pending | int  # an int is a float buffer that holds the value


class _Compiler:
    """Walks the layers of one agent; buffers and operations are added as values find their place."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.ops: list[Op] = []
        self.buffers: list[Buffer] = []
        self.image: tuple[int, ...] | None = None

    def program(self) -> Program:
        agent = self.agent
        inputs = {key: _shown_shape(part) for key, part in agent.parts.items()}
        for shape in inputs.values():
            self._buffer(int(np.prod(shape, dtype=np.int64)))
        memories = self._memories(agent.actor.rnn)
        encoded = [self._encode(index, key) for index, key in enumerate(agent.actor.keys)]
        value = encoded[0] if len(encoded) == 1 else self._joined(encoded)
        states = []
        for layer, memory in enumerate(memories):
            value = self._step(agent.actor.rnn, layer, value, memory)
            states.append((memory, value.buffer))
        output = self._place(self._run(_layers(agent.actor.trunk), value))
        if output != len(self.buffers) - 1:
            output = self._affine(_identity(output, self.buffers[output].size))
        name = f"{agent.precision} {agent.method}".strip()
        head = _head(agent.head)
        return Program(tuple(self.buffers), inputs, tuple(self.ops), head, name, tuple(states))

    def _encode(self, index: int, key: str) -> _Value:
        part = self.agent.parts[key]
        self.image = part.network_shape if len(part.network_shape) == 3 else None
        shown = (
            _observation(part, index) if part.space.kind in ("box", "multibinary") else self._hot(part, index)
        )
        return self._run(_layers(self.agent.actor.encoder(key)), shown)

    def _hot(self, part: ObservationPart, index: int) -> int:
        """Choices as one-hot codes, side by side."""
        if part.stack > 1:
            raise InputError(f"stacked {_not_compiled(part)}")
        sizes = part.space.sizes
        order = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        value = np.concatenate([np.arange(size, dtype=np.float32) for size in sizes])
        target = self._buffer(len(order))
        self.ops.append(OneHot(index, target, order, value))
        return target

    def _memories(self, rnn: Any) -> list[int]:
        """A buffer for each recurrent layer: its hidden state, and an LSTM's cell state after it."""
        if rnn is None:
            return []
        return [self._buffer(CELL_KINDS[_cell(rnn)][1] * rnn.hidden_size) for _ in range(rnn.num_layers)]

    def _step(self, rnn: Any, layer: int, value: _Value, memory: int) -> _Mapped:
        """One layer's step: its hidden state, at the start of what it then remembers."""
        kind, hidden = _cell(rnn), np.arange(rnn.hidden_size, dtype=np.int32)
        gates = CELL_KINDS[kind][0] * rnn.hidden_size
        shares = self._buffer(2 * gates)
        entering = replace(_identity(memory, rnn.hidden_size), order=hidden)
        for part, what, given, start in (("ih", "input", value, 0), ("hh", "hidden", entering, gates)):
            quantizer = getattr(rnn, f"{what}_quant_l{layer}", None)
            grid = None if quantizer is None else Grid.of(quantizer)
            product = recurrent_product(rnn, part, layer, self._place(given, grid), grid)
            self.ops.append(replace(product, target=shares, start=start))
        after = self._buffer(self.buffers[memory].size)
        self.ops.append(Gates(shares, after, memory, kind))
        return replace(_identity(after, rnn.hidden_size), order=hidden)

    def _run(self, layers: list[nn.Module], value: _Value) -> _Value:
        for layer in layers:
            name = type(layer).__name__
            if isinstance(layer, nn.Flatten | nn.Identity):
                self.image = None if isinstance(layer, nn.Flatten) else self.image
            elif isinstance(layer, FeatureMap):
                low, span = (x.double().numpy() for x in (layer.low, layer.inverse_span))
                value = self._mapped(value).then(span, -low * span)
            elif isinstance(layer, nn.Hardtanh):
                value = self._mapped(value).within(layer.min_val, layer.max_val)
            elif name in ACTIVATIONS:
                value = self._activated(value, _plain(layer))
            else:
                value = self._multiplied(layer, value)
        return value

    def _multiplied(self, layer: nn.Module, value: _Value) -> _Pending:
        grid = _grid_of([layer])
        source = self._place(value, grid, prescale=_prescale(layer, self.image))
        op, self.image = product_of(layer, source, grid, self.image)
        positions = 1 if self.image is None else self.image[1] * self.image[2]
        return _Pending(op, op.weight.rows * positions)

    def _activated(self, value: _Value, kind: str) -> _Value:
        if isinstance(value, _Pending) and value.activation is None:
            return replace(value, activation=kind)
        return self._activate(self._place(value), kind)

    def _joined(self, values: list[_Value]) -> _Value:
        """Several parts side by side in one float buffer."""
        sizes = [self._size(value) for value in values]
        target, start = self._buffer(sum(sizes)), 0
        placed = [self._mapped(value) for value in values]  # before the target's ops, which read them
        for value, size in zip(placed, sizes, strict=True):
            self._affine(value, target, start)
            start += size
        return target

    def _place(self, value: _Value, grid: Grid | None = None, prescale: Array | None = None) -> int:
        """The buffer that holds a value: in float, or on a grid after ``prescale``."""
        if grid is None and prescale is None:
            return self._place_float(value)
        if isinstance(value, _Pending) and grid is not None and not self.buffers[value.op.source].is_float:
            if prescale is None and value.activation in (None, "ReLU"):
                return self._requantized(value, grid)
            if value.activation not in (None, "ReLU"):
                return self._tabulated(value, grid, prescale)
        mapped = self._mapped(value).then(1.0 if prescale is None else prescale)
        return self._affine(mapped) if grid is None else self._quantized(mapped, grid)

    def _place_float(self, value: _Value) -> int:
        if isinstance(value, int):
            return value
        if isinstance(value, _Mapped):
            return value.buffer if value.is_identity else self._affine(value)
        target = self._buffer(value.size)
        self.ops.append(replace(value.op, target=target))
        return target if value.activation is None else self._activate(target, value.activation)

    def _requantized(self, value: _Pending, grid: Grid) -> int:
        """A product of integers, rounded to the next grid; ReLU is the clamp at its zero point."""
        low = grid.zero if value.activation == "ReLU" else 0
        return self._rounded(value, grid.scale, grid.zero, low, grid.high, grid.bits)

    def _rounded(self, value: _Pending, scale: float, zero: int, low: int, high: int, bits: int) -> int:
        op, target = value.op, self._buffer(value.size, bits)
        gain, bias = ((x.astype(np.float64) / scale).astype(np.float32) for x in (op.gain, op.bias))
        self.ops.append(replace(op, target=target, gain=gain, bias=bias, zero=zero, low=low, high=high))
        return target

    def _tabulated(self, value: _Pending, grid: Grid, prescale: Array | None) -> int:
        """A product, rounded to a fine grid over the range where the activation changes, and looked up."""
        assert value.activation is not None
        function = ACTIVATIONS[value.activation]
        fine = grid if prescale is None else _wide(grid, prescale)
        start, step = _active_range(function, fine)
        zero = round(-start / step)
        before = self._rounded(value, step, zero, 0, 2**TABLE_BITS - 1, TABLE_BITS)
        entries = function((np.arange(2**TABLE_BITS) - zero) * step)
        table = np.clip(np.rint(entries / fine.scale) + fine.zero, 0, fine.high).astype(np.uint16)
        target = self._buffer(value.size, fine.bits)
        self.ops.append(Table(before, target, table))
        if prescale is None:
            return target
        return self._quantized(
            _identity(target, value.size).then(fine.scale, -fine.zero * fine.scale).then(prescale), grid
        )

    def _quantized(self, value: _Mapped, grid: Grid) -> int:
        on_grid = value.then(1.0 / grid.scale, grid.zero).within(0, grid.high)
        return self._affine(on_grid, self._buffer(len(value.gain), grid.bits))

    def _affine(self, value: _Mapped, target: int | None = None, start: int = 0) -> int:
        target = self._buffer(len(value.gain)) if target is None else target
        gain, offset, low, high = (_compact(x) for x in (value.gain, value.offset, value.low, value.high))
        self.ops.append(Affine(value.buffer, target, gain, offset, low, high, start, value.order))
        return target

    def _activate(self, source: int, kind: str) -> int:
        target = self._buffer(self.buffers[source].size)
        self.ops.append(Activate(source, target, kind))
        return target

    def _mapped(self, value: _Value) -> _Mapped:
        if isinstance(value, _Mapped):
            return value
        buffer = self._place_float(value)
        return _identity(buffer, self.buffers[buffer].size)

    def _size(self, value: _Value) -> int:
        if isinstance(value, int):
            return self.buffers[value].size
        return value.size if isinstance(value, _Pending) else len(value.gain)

    def _buffer(self, size: int, bits: int = 32) -> int:
        self.buffers.append(Buffer(size, bits))
        return len(self.buffers) - 1


def _identity(buffer: int, size: int) -> _Mapped:
    infinite = np.full(size, np.inf)
    return _Mapped(buffer, np.ones(size), np.zeros(size), -infinite, infinite)


def _observation(part: ObservationPart, buffer: int) -> _Mapped:
    """The network input of an observation: normalised, clipped, scaled, channels first."""
    if part.stack > 1 and part.normaliser is not None:  # frames before an episode are zeros after normalising
        raise InputError(f"normalised and then stacked {_not_compiled(part)}")
    shape = _shown_shape(part)
    value = _identity(buffer, int(np.prod(shape, dtype=np.int64)))
    if part.normaliser is not None:
        deviation = np.sqrt(part.normaliser.var + part.normaliser.epsilon)
        mean, inverse = (np.broadcast_to(x, shape).ravel() for x in (part.normaliser.mean, 1 / deviation))
        value = value.then(inverse, -mean * inverse).within(-part.normaliser.clip, part.normaliser.clip)
    if part.transpose:
        order = np.arange(len(value.gain)).reshape(shape).transpose(2, 0, 1).ravel().astype(np.int32)
        arrays = {name: getattr(value, name)[order] for name in ("gain", "offset", "low", "high")}
        value = replace(value, order=order, **arrays)
    return value.then(1.0 / part.scale) if part.scale != 1.0 else value


def _not_compiled(part: ObservationPart) -> str:
    return f"observations of {part.space.describe()} cannot be compiled into a program; the runtime torch can run them"


def _cell(rnn: nn.Module) -> str:
    """Of :data:`CELL_KINDS`."""
    return "LSTM" if "LSTM" in type(rnn).__name__ else "GRU"


def _shown_shape(part: ObservationPart) -> tuple[int, ...]:
    """Of an observation as the environment shows it, with frames stacked."""
    shape = list(part.space.shape)
    if part.stack > 1:
        shape[0 if part.stack_axis == 1 else -1] *= part.stack
    return tuple(shape)


def _layers(module: nn.Module) -> list[nn.Module]:
    return (
        [layer for child in module for layer in _layers(child)]
        if isinstance(module, nn.Sequential)
        else [module]
    )


def _plain(layer: nn.Module) -> str:
    """The name of an activation with torch's default parameters."""
    name, ours = type(layer).__name__, vars(layer)
    if any(
        vars(type(layer)()).get(key) != ours[key]
        for key in ("alpha", "negative_slope", "beta")
        if key in ours
    ):
        raise InputError(f"{layer} has other than torch's default parameters: the runtime torch can run it")
    return name


def _grid_of(layers: list[nn.Module]) -> Grid | None:
    quantizer = getattr(layers[0], "input_quant", None) if layers else None
    return Grid.of(quantizer) if quantizer is not None else None


def _prescale(layer: nn.Module, image: tuple[int, ...] | None) -> Array | None:
    """What multiplies each number of a layer's input first, or None."""
    scale = getattr(layer, "input_scale", None)
    if scale is None:
        return None
    numbers: Array = scale.double().numpy()
    return numbers if image is None else np.repeat(numbers, image[1] * image[2])


def _wide(grid: Grid, prescale: Array) -> Grid:
    """A finer grid of the values before ``prescale``, for results of a table."""
    low, high = -grid.zero * grid.scale, (grid.high - grid.zero) * grid.scale
    reach = 1.0 / prescale.min()
    scale = (high - low) * reach / (2**_WIDE_BITS - 1)
    return Grid(scale, round(-low * reach / scale), _WIDE_BITS)


def _active_range(function: Any, grid: Grid) -> tuple[float, float]:
    """Start and step of a fine grid that covers where ``function``, rounded to ``grid``, changes; zero is on it."""
    rounded = np.clip(np.rint(function(_SCAN) / grid.scale) + grid.zero, 0, grid.high)
    changes = np.flatnonzero(np.diff(rounded))
    low, high = (_SCAN[changes[0]], _SCAN[changes[-1] + 1]) if len(changes) else (-1.0, 1.0)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    step = (high - low) / (2**TABLE_BITS - 2)
    return -np.ceil(-low / step) * step, step


def _compact(x: Array) -> NDArray[np.float32]:
    """float32, of one element where all are equal."""
    single: NDArray[np.float32] = x.astype(np.float32)
    return single[:1].copy() if (single == single[0]).all() else single


def _head(head: Head) -> ProgramHead:
    if not head.space.sizes and head.kind in ("clip", "tanh", "unscale"):
        low, high = (bound.ravel().astype(np.float32) for bound in head.space.bounds())
        return ProgramHead(head.kind, head.outputs, low=low, high=high, shape=tuple(head.space.shape))
    return ProgramHead(head.kind, head.outputs, tuple(head.space.sizes), shape=tuple(head.space.shape))
