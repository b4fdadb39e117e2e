"""The NumPy interpreter against the formulas written out in Python's integers, torch's convolution, and agents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_programs import memories, observations, programs
from shipped import SHIPPED

from rlquant.control import Agent, Session, collect, load, make_env, quantize_agent
from rlquant.control.compile import compile_agent
from rlquant.control.observation import FrameStack
from rlquant.deploy import reference
from rlquant.deploy.files import program_files, program_from_files
from rlquant.deploy.head import ProgramHead, tanh32
from rlquant.deploy.program import (
    Activate,
    Affine,
    Buffer,
    Conv2d,
    Gates,
    Linear,
    OneHot,
    Program,
    Table,
    Weight,
)
from rlquant.errors import InputError
from rlquant.quant.activations import StaticQuantizer

ZOO = os.environ.get("RLQUANT_TEST_ZOO")
OTHERS = sorted(str(path) for path in Path(ZOO).glob("*/*_1")) if ZOO else []
STEPS = 400
NEAR_A_TIE = 3e-4  # steps of a grid: what rounding in float32 may shift before a number is rounded to it

f32 = np.float32


# The formulas of the program's docstring, one number at a time. ------------------------------------------------


def literal(program: Program, row: dict[str, np.ndarray], state: np.ndarray) -> tuple[list[Any], list[Any]]:
    """Head outputs for one observation, and what is remembered then."""
    buffers: list[list[Any]] = [[None] * buffer.size for buffer in program.buffers]
    for index, key in enumerate(program.inputs):
        buffers[index] = [f32(number) for number in row[key].ravel()]
    numbers = iter(state)
    for index, _ in program.states:
        buffers[index] = [next(numbers) for _ in buffers[index]]
    for op in program.ops:
        source, target = program.buffers[op.source], program.buffers[op.target]
        x = buffers[op.source]
        if isinstance(op, Affine):
            result = literal_affine(op, x, target.bits)
        elif isinstance(op, Table):
            result = [int(op.table[q]) for q in x]
        elif isinstance(op, OneHot):
            result = [f32(x[at] == value) for at, value in zip(op.order, op.value, strict=True)]
        elif isinstance(op, Gates):
            result = literal_cell(op.kind, x, buffers[op.memory])
        elif isinstance(op, Activate):
            result = [max(number, f32(0)) if op.kind == "ReLU" else tanh(number) for number in x]
        else:
            result = literal_product(op, x, target.bits)
        start = getattr(op, "start", 0)
        buffers[op.target][start : start + len(result)] = result
        assert source.size == len(x)
    return buffers[-1], [number for _, after in program.states for number in buffers[after]]


def tanh(x: Any) -> Any:
    return tanh32(np.array([x], f32))[0]


def sigmoid(x: Any) -> Any:
    return f32(f32(f32(0.5) * tanh(f32(f32(0.5) * x))) + f32(0.5))


def literal_cell(kind: str, shares: list[Any], memory: list[Any]) -> list[Any]:
    """The equations of torch.nn.LSTMCell and torch.nn.GRUCell, unit by unit."""
    hidden, cells = [], []
    size = len(memory) // (2 if kind == "LSTM" else 1)
    for unit in range(size):
        parts = shares[unit::size]  # each gate's from the input, then each gate's from the hidden state
        if kind == "LSTM":
            i, f, g, o = (f32(parts[gate] + parts[4 + gate]) for gate in range(4))
            kept = f32(sigmoid(f) * memory[size + unit])
            cells.append(f32(kept + f32(sigmoid(i) * tanh(g))))
            hidden.append(f32(sigmoid(o) * tanh(cells[-1])))
        else:
            r, z = (sigmoid(f32(parts[gate] + parts[3 + gate])) for gate in range(2))
            n = tanh(f32(parts[2] + f32(r * parts[5])))
            hidden.append(f32(f32(f32(f32(1) - z) * n) + f32(z * memory[unit])))
    return hidden + cells


def literal_affine(op: Affine, x: list[Any], bits: int) -> list[Any]:
    order = range(len(x)) if op.order is None else op.order.tolist()
    result = []
    for index, source in enumerate(order):
        gain, offset, low, high = (
            each[index if len(each) > 1 else 0] for each in (op.gain, op.offset, op.low, op.high)
        )
        y = f32(f32(f32(x[source]) * gain) + offset)
        y = min(max(y, low), high)
        result.append(y if bits == 32 else round(float(y)))
    return result


def literal_product(op: Linear, x: list[int], bits: int) -> list[Any]:
    result = []
    weights = literal_codes(op.weight)
    for row in range(op.weight.rows):
        for taps in literal_taps(op, row):
            total = None
            for group in range(-(-op.weight.columns // op.group)):
                accumulator = 0
                for column in range(group * op.group, min((group + 1) * op.group, op.weight.columns)):
                    q = op.source_zero if taps[column] is None else x[taps[column]]
                    accumulator += weights[row * op.weight.columns + column] * (q - op.source_zero)
                assert -(2**31) <= accumulator < 2**31
                part = f32(f32(accumulator) * op.gain[row, group])
                total = part if total is None else f32(total + part)
            y = f32(total + op.bias[row])
            result.append(y if bits == 32 else int(min(max(round(float(y)) + op.zero, op.low), op.high)))
    return result


def literal_codes(weight: Weight) -> list[int]:
    """Two's complement, the first in the lowest bits of one long little-endian integer."""
    stream, bits = int.from_bytes(weight.codes.tobytes(), "little"), weight.bits
    codes = [stream >> (bits * index) & (2**bits - 1) for index in range(weight.rows * weight.columns)]
    return [code - 2**bits if code >= 2 ** (bits - 1) else code for code in codes]


def literal_taps(op: Linear, row: int) -> Iterator[list[int | None]]:
    """For each place of the result, the index of the source under each column; None outside of the image."""
    if not isinstance(op, Conv2d):
        yield list(range(op.weight.columns))
        return
    channels, height, width = op.image
    first = row // (op.weight.rows // op.blocks) * (channels // op.blocks)
    for top in range(op.out_size[0]):
        for left in range(op.out_size[1]):
            taps: list[int | None] = []
            for channel in range(first, first + channels // op.blocks):
                for i in range(op.kernel[0]):
                    for j in range(op.kernel[1]):
                        y = top * op.stride[0] + i * op.dilation[0] - op.padding[0]
                        x = left * op.stride[1] + j * op.dilation[1] - op.padding[1]
                        inside = 0 <= y < height and 0 <= x < width
                        taps.append((channel * height + y) * width + x if inside else None)
            yield taps


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs(widest=8), st.integers(0, 2**32 - 1))
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_computes_the_formulas_to_the_bit(program: Program, seed: int) -> None:
    rows = 3
    x = {key: part[-rows:] for key, part in observations(program, 17 + rows, seed).items()}
    x = {
        key: np.concatenate([part, observations(program, 1, seed)[key]]) for key, part in x.items()
    }  # an extreme
    before = memories(program, rows + 1, seed)
    after = before.copy()
    given = reference.run(program, x, after)
    for row in range(rows + 1):
        outputs, state = literal(program, {key: part[row] for key, part in x.items()}, before[row])
        for found, expected in ((given[row], outputs), (after[row], state)):
            np.testing.assert_array_equal(found.view(np.int32), np.array(expected, f32).view(np.int32))


def test_rounds_half_to_even_and_adds_the_zero_point_after() -> None:
    one = np.ones(1, f32)
    weight = Weight(1, 1, 2, np.array([1], np.uint8))
    ops = (
        Affine(0, 1, one, 0 * one, 0 * one, 15 * one),
        Linear(1, 2, weight, 0 * one, 0.5 * np.ones((1, 1), f32), 1, zero=1, high=15),
        Affine(2, 3, one, 0 * one, 0 * one, 15 * one),
    )
    program = Program(
        (Buffer(1), Buffer(1, 4), Buffer(1, 4), Buffer(1)), {"": (1,)}, ops, ProgramHead("argmax", 1)
    )
    x = np.array([0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, np.inf, -np.inf], f32)
    codes = [0, 0, 1, 2, 2, 2, 3, 4, 5, 15, 0]
    halves = [0, 0, 0, 1, 1, 1, 2, 2, 2, 8, 0]  # of the codes, to even
    given = reference.run(program, {"": x[:, None]})[:, 0]
    assert [round(code / 2) for code in codes] == halves
    assert given.tolist() == [half + 1 for half in halves]


def test_each_float_operation_is_rounded() -> None:
    """A fused multiply-add, or an accumulation in double precision, would give other bits here."""
    rng = np.random.default_rng(0)
    size, infinite = 5_000, np.full(1, np.inf, f32)
    gain, offset, x = (rng.normal(size=size).astype(f32) for _ in range(3))
    program = Program(
        (Buffer(size), Buffer(size)),
        {"": (size,)},
        (Affine(0, 1, gain, offset, -infinite, infinite),),
        ProgramHead("argmax", size),
    )
    given = reference.run(program, {"": x[None]})[0]
    np.testing.assert_array_equal(given, np.array(literal(program, {"": x}, x[:0])[0], f32))
    fused = (x.astype(np.float64) * gain + offset).astype(f32)
    assert (given != fused).mean() > 0.05


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_convolution_is_torchs(data: st.DataObject) -> None:
    number = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    blocks, kernel, padding = number(1, 3), (number(1, 3), number(1, 3)), (number(0, 2), number(0, 2))
    stride, dilation = (number(1, 3), number(1, 3)), (number(1, 2), number(1, 2))
    image = (blocks * number(1, 3), number(5, 9), number(5, 9))
    rows, columns = blocks * number(1, 3), image[0] // blocks * kernel[0] * kernel[1]
    rng = np.random.default_rng(number(0, 1000))
    codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    weight = Weight(rows, columns, 8, codes.view(np.uint8).ravel())
    one, source_zero = np.ones(1, f32), number(0, 255)
    geometry: dict[str, Any] = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    conv = Conv2d(
        *(1, 2, weight, np.zeros(rows, f32), np.ones((rows, 1), f32), columns),
        source_zero=source_zero,
        image=image,
        blocks=blocks,
        **geometry,
    )
    size, positions = int(np.prod(image)), int(np.prod(conv.out_size))
    program = Program(
        (Buffer(size), Buffer(size, 8), Buffer(rows * positions)),
        {"": image},
        (Affine(0, 1, one, 0 * one, 0 * one, 255 * one), conv),
        ProgramHead("argmax", rows * positions),
    )
    x = rng.integers(0, 256, (3, *image)).astype(f32)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).double() - source_zero,
        torch.from_numpy(codes).double().reshape(rows, image[0] // blocks, *kernel),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=blocks,
    )
    np.testing.assert_array_equal(reference.run(program, {"": x}), expected.flatten(1).float().numpy())


def test_tanh_is_tanh_within_rounding_odd_and_bounded() -> None:
    x = np.concatenate([np.linspace(-12, 12, 200_001), np.geomspace(1e-30, 1, 10_000)]).astype(f32)
    expected = np.tanh(x.astype(np.float64))
    np.testing.assert_allclose(tanh32(x), expected, rtol=5e-7)
    np.testing.assert_array_equal(tanh32(-x), -tanh32(x))
    assert np.abs(tanh32(x)).max() <= 1


def test_accumulators_that_could_overflow_are_refused() -> None:
    columns = 2**16
    weight = Weight(1, columns, 8, np.full(columns, 127, np.uint8))
    one = np.ones(1, f32)
    ops = (
        Affine(0, 1, one, 0 * one, 0 * one, 255 * one),
        Linear(1, 2, weight, 0 * one, np.ones((1, 1), f32), columns),
    )
    with pytest.raises(InputError, match="could overflow a 32-bit accumulator"):
        Program(
            (Buffer(columns), Buffer(columns, 9), Buffer(1)), {"": (columns,)}, ops, ProgramHead("argmax", 1)
        )


# Agents: the program of a quantized network against the network of fake-quantized floats. ----------------------


@cache
def on_policy(source: str) -> tuple[Agent, dict[str, np.ndarray], np.ndarray]:
    """An agent, what its environment showed in :data:`STEPS` steps, and where episodes began."""
    agent = load(source)
    world, session = make_env(agent.env), Session(agent, rows=1)
    seed, start, starts = 3, True, []
    shown: dict[str, list[np.ndarray]] = {key: [] for key in agent.parts}
    observation, _ = world.reset(seed=seed)
    for _ in range(STEPS):
        parts = observation if isinstance(observation, dict) else {"": observation}
        for key, rows in shown.items():
            rows.append(np.array(parts[key]))
        starts.append(start)
        batch = {key: np.asarray(part)[None] for key, part in parts.items()}
        action = session.act(batch, np.array([start]))[0]
        observation, _, terminated, truncated, _ = world.step(action)
        start = terminated or truncated
        if start:
            seed += 1
            observation, _ = world.reset(seed=seed)
    return agent, {key: np.stack(rows) for key, rows in shown.items()}, np.array(starts)


@contextmanager
def distance_to_ties(agent: Agent, distances: list[float]) -> Iterator[None]:
    """Collects, for each forward pass, how near an input of a layer comes to the middle of two steps."""

    def look(quantizer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        places = inputs[0][:1].double() / float(quantizer.scale) + float(quantizer.zero_point)
        inside = places[(places > -1) & (places < 2**quantizer.fmt.bits)]
        away = (inside - inside.floor() - 0.5).abs()
        distances[-1] = min(distances[-1], float(away.min()) if len(away) else 1.0)

    quantizers = [module for module in agent.actor.modules() if isinstance(module, StaticQuantizer)]
    hooks = [quantizer.register_forward_pre_hook(look) for quantizer in quantizers]
    yield
    for hook in hooks:
        hook.remove()


@dataclass
class Played:
    """What the torch network did step after step, how near it came to ties, and what it remembered before."""

    outputs: np.ndarray
    actions: np.ndarray
    distances: np.ndarray
    states: np.ndarray


def by_torch(agent: Agent, shown: dict[str, np.ndarray], starts: np.ndarray) -> Played:
    session = Session(agent, rows=1, tile=1)
    outputs, actions, states = [], [], []
    distances: list[float] = []
    with distance_to_ties(agent, distances):
        for row, start in enumerate(starts):
            distances.append(1.0)
            states.append(remembered(session) * (not start))
            actions.append(
                session.act({key: part[row][None] for key, part in shown.items()}, np.array([start]))[0]
            )
            outputs.append(session.outputs[0].copy())
    return Played(np.stack(outputs), np.stack(actions), np.array(distances), np.stack(states))


def remembered(session: Session) -> np.ndarray:
    """float32 ``[state_size]``: layer by layer, an LSTM's cell state after its hidden state."""
    state = session._states[0]
    if state is None:
        return np.zeros(0, f32)
    parts = state if isinstance(state, tuple) else (state,)
    return np.stack([part[:, 0].numpy() for part in parts], axis=1).ravel()


def stacked(agent: Agent, shown: dict[str, np.ndarray], starts: np.ndarray) -> dict[str, np.ndarray]:
    """What the program takes: frames stacked."""
    found = {}
    for key, part in agent.parts.items():
        rows = shown[key]
        if part.stack > 1:
            frames = FrameStack(part, 1)
            rows = np.stack(
                [frames.push(x[None], start[None])[0].copy() for x, start in zip(rows, starts, strict=True)]
            )
        found[key] = rows
    return found


def check_agent(source: str, scheme: str) -> None:
    agent, shown, starts = on_policy(source)
    quantized = agent
    if scheme != "fp32":
        quantized = quantize_agent(agent, scheme, inputs=collect(agent, 1, seed=5, limit=1000))
    try:
        program = compile_agent(quantized)
    except InputError as error:
        pytest.skip(str(error))
    program = program_from_files(program_files(program), "memory")
    played = by_torch(quantized, shown, starts)
    expected, actions, states = played.outputs, played.actions, played.states.copy()
    given = reference.run(program, stacked(agent, shown, starts), states)
    taken = program.head(given)
    assert taken.dtype == actions.dtype
    assert taken.shape == actions.shape
    discrete = actions.dtype.kind == "i"
    if program.is_integer:  # as near to fp32 as the network of fake-quantized floats, ties or not
        exact = by_torch(agent, shown, starts).outputs
        assert rms(given - exact) < 1.1 * rms(expected - exact)
        assert not discrete or (taken == actions).reshape(STEPS, -1).all(axis=1).mean() >= 0.975
    if any(isinstance(op, Table) for op in program.ops):
        assert rms(given - expected) < 0.02 * rms(expected)
        return  # a table rounds before it looks up
    free = played.distances > NEAR_A_TIE
    assert free.mean() > 0.15 or source not in SHIPPED
    size = np.abs(expected).max()
    np.testing.assert_allclose(given[free], expected[free], rtol=1e-5, atol=1e-5 * size)
    going_on = free[:-1] & ~starts[1:]
    np.testing.assert_allclose(states[:-1][going_on], played.states[1:][going_on], rtol=0, atol=1e-5)
    close = 0 if discrete else 1e-4 * np.abs(actions).max()
    np.testing.assert_allclose(taken[free], actions[free], rtol=0, atol=close)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


@pytest.mark.parametrize("scheme", ["fp32", "int4", "w8a8", "w4a8-g32"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_agents_act_as_their_networks(name: str, scheme: str) -> None:
    check_agent(name, scheme)


@pytest.mark.slow
@pytest.mark.skipif(not OTHERS, reason="RLQUANT_TEST_ZOO does not name a folder of rl-zoo agents")
@pytest.mark.parametrize("scheme", ["fp32", "w8a8", "w4a8-g32"])
@pytest.mark.parametrize("source", OTHERS, ids=["/".join(Path(source).parts[-2:]) for source in OTHERS])
def test_agents_of_others_act_as_their_networks(source: str, scheme: str) -> None:
    check_agent(source, scheme)
