"""Programs on a GPU give the reference's bits; without a GPU, Triton's interpreter runs the same kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_programs import memories, observations, programs
from shipped import SHIPPED, compiled

from rlquant.deploy import reference
from rlquant.deploy.cuda import CudaRuntime
from rlquant.deploy.floats import ACTIVATIONS
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import Activate, Affine, Buffer, Linear, Program, Weight
from rlquant.deploy.runtime import ReferenceRuntime, make_runtime
from rlquant.errors import InputError

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROWS = 1000 if ON_GPU else 20

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),  # of the interpreter, on extremes
    pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide:RuntimeWarning"),
]
hypothesis_settings = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def shown(x: dict[str, np.ndarray]) -> Any:
    """As the environment shows it."""
    return x[""] if set(x) == {""} else x


def assert_same_bits(given: np.ndarray, expected: np.ndarray) -> None:
    assert given.dtype == expected.dtype
    np.testing.assert_array_equal(given.view(np.int32), expected.view(np.int32))


@pytest.fixture
def pendulum() -> Iterator[CudaRuntime]:
    runtime = CudaRuntime(compiled("sac-pendulum", "w8a8"), device=DEVICE)
    yield runtime
    runtime.close()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w2a4"] if ON_GPU else ["w8a8", "w4a8-g32"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_agents_give_the_bits_of_the_reference(name: str, scheme: str) -> None:
    program = compiled(name, scheme)
    assert program.is_integer
    x = observations(program, 10_000 if ON_GPU else 2 if name == "cnn-catch" else 64)
    states = memories(program, len(next(iter(x.values()))))
    after = states.copy()
    expected = reference.run(program, x, states)
    runtime = CudaRuntime(program, device=DEVICE)
    assert_same_bits(runtime.outputs(shown(x), after), expected)
    assert_same_bits(after, states)
    np.testing.assert_array_equal(runtime.act_batch(shown(x)), ReferenceRuntime(program).act_batch(shown(x)))


@hypothesis_settings
@given(programs())
def test_any_program_gives_the_bits_of_the_reference(program: Program) -> None:
    x = observations(program, ROWS)
    states, after = memories(program, ROWS), memories(program, ROWS)
    expected = reference.run(program, x, states)
    runtime = CudaRuntime(program, device=DEVICE)
    assert_same_bits(runtime.outputs(shown(x), after), expected)
    assert_same_bits(after, states)


@pytest.mark.parametrize("resident", [False, True])
@hypothesis_settings
@given(programs(widest=20))
def test_one_observation_at_a_time(resident: bool, program: Program) -> None:
    """It remembers until an episode begins."""
    x = observations(program, 6)
    with CudaRuntime(program, device=DEVICE, resident=resident) as runtime:
        plain = ReferenceRuntime(program)
        for row in range(6):
            if row == 4:
                runtime.reset()
                plain.reset()
            one = {key: part[row] for key, part in x.items()}
            action, expected = runtime.act(shown(one)), plain.act(shown(one))
            assert np.asarray(action).dtype == np.asarray(expected).dtype
            np.testing.assert_array_equal(action, expected)


@pytest.mark.parametrize("weight_bits", [8, 9, 16])
@pytest.mark.parametrize("bits", [8, 9, 16])
def test_extremes_of_grids_and_weights(bits: int, weight_bits: int) -> None:
    """Each number at an end of its range, where bytes carry and int32 wraps around on the way."""
    rng, top = np.random.default_rng(0), 2**bits - 1
    columns = min(40, (2**31 - 1) // (2 ** (weight_bits - 1) * top))  # as many as the accumulator takes
    ends = np.array([-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1) - 1])
    values = rng.choice(ends, (20, columns))
    stream = (values.ravel()[:, None] >> np.arange(weight_bits)) & 1
    weight = Weight(20, columns, weight_bits, np.packbits(stream.astype(np.uint8), bitorder="little"))
    np.testing.assert_array_equal(weight.values, values)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    bias, gain = np.zeros(20, np.float32), np.full((20, 1), 2.0**-8, np.float32)
    program = Program(
        (Buffer(columns), Buffer(columns, bits), Buffer(20)),
        {"": (columns,)},
        (Affine(0, 1, one, zero, zero, one * top), Linear(1, 2, weight, bias, gain, columns, top // 3)),
        ProgramHead("argmax", 20),
    )
    x = rng.choice(np.array([0, 1, 127, 128, 255, 256, top - 1, top], np.float32), (200, columns))
    assert_same_bits(CudaRuntime(program, device=DEVICE).outputs(x), reference.run(program, {"": x}))


@pytest.mark.parametrize("name", ["dqn-cartpole", "sac-halfcheetah", "recurrentppo-cartpole"])
@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_floats_agree_up_to_the_order_of_sums(name: str, scheme: str) -> None:
    program = compiled(name, scheme)
    x = np.random.default_rng(0).normal(size=(50, *program.inputs[""])).astype(np.float32)
    expected = reference.run(program, {"": x})
    np.testing.assert_allclose(CudaRuntime(program, device=DEVICE).outputs(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_activations(kind: str) -> None:
    head = ProgramHead("argmax", 100)
    program = Program((Buffer(100), Buffer(100)), {"": (100,)}, (Activate(0, 1, kind),), head)
    x = np.linspace(-12, 12, 300, dtype=np.float32).reshape(3, 100)
    expected = ACTIVATIONS[kind](x.astype(np.float64))
    np.testing.assert_allclose(CudaRuntime(program, device=DEVICE).outputs(x), expected, rtol=2e-6, atol=1e-6)


def test_masked_choices() -> None:
    program = compiled("ppo-lunarlander", "w8a8")
    x = observations(program, 40)[""]
    masks = np.random.default_rng(0).random((40, program.head.outputs)) < 0.5
    masks[:, 1] = True
    plain, runtime = ReferenceRuntime(program), CudaRuntime(program, device=DEVICE)
    np.testing.assert_array_equal(runtime.act_batch(x, masks), plain.act_batch(x, masks))
    for row in range(5):
        assert runtime.act(x[row], masks[row]) == plain.act(x[row], masks[row])
    with pytest.raises(InputError, match="masks of 4 choices"):
        runtime.act(x[0], masks[0, :2])


def test_other_kinds_of_numbers(pendulum: CudaRuntime) -> None:
    x = np.array([0.5, -0.25, 1.0])
    expected = pendulum.act(x.astype(np.float32))
    np.testing.assert_array_equal(pendulum.act(x), expected)
    np.testing.assert_array_equal(pendulum.act(x.tolist()), expected)
    np.testing.assert_array_equal(pendulum.act(np.array([1, 0, 1])), pendulum.act(np.array([1.0, 0.0, 1.0])))


def test_nan_is_refused_and_nothing_is_lost(pendulum: CudaRuntime) -> None:
    x = np.array([0.5, -0.25, 1.0], np.float32)
    expected = pendulum.act(x)
    with pytest.raises(InputError, match="NaN"):
        pendulum.act(np.array([0.5, np.nan, 1.0], np.float32))
    with pytest.raises(InputError, match="NaN"):
        pendulum.outputs(np.array([[0.5, np.nan, 1.0]]))
    np.testing.assert_array_equal(pendulum.act(x), expected)


def test_wrong_observations(pendulum: CudaRuntime) -> None:
    with pytest.raises(InputError, match=r"shape \[4\]; this policy takes \[3\]"):
        pendulum.act(np.zeros(4, np.float32))
    with pytest.raises(InputError, match=r"contiguous float32 observations \[2, 3\]"):
        pendulum.act_tensor(torch.zeros(2, 4, device=DEVICE))
    with pytest.raises(InputError, match=r"contiguous float32 states \[2, 0\]"):
        pendulum.act_tensor(torch.zeros(2, 3, device=DEVICE), torch.zeros(2, 1, device=DEVICE))
    with pytest.raises(InputError, match=r"contiguous float32 observations \[2, 3\]"):
        pendulum.act_tensor(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE))


def test_no_observation_and_tensors(pendulum: CudaRuntime) -> None:
    assert pendulum.act_batch(np.zeros((0, 3), np.float32)).shape == (0, 1)
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    found = pendulum.act_tensor(torch.from_numpy(x).to(DEVICE))
    np.testing.assert_array_equal(found.cpu().numpy(), pendulum.act_batch(x))


def test_a_closed_runtime_says_so(pendulum: CudaRuntime) -> None:
    x = np.zeros(3, np.float32)
    before = pendulum.act(x)
    pendulum.close()
    with pytest.raises(InputError, match="closed"):
        pendulum.act(x)
    np.testing.assert_array_equal(pendulum.act_batch(x[None])[0], before)


@pytest.mark.skipif(ON_GPU, reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_can_run() -> None:
    with pytest.raises(
        InputError, match=r"no CUDA device.*torch sees 0; runtimes that can: native, onnx, reference"
    ):
        make_runtime("cuda", compiled("sac-pendulum", "w8a8"))


def test_the_interpreter_never_runs_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled("sac-pendulum", "w8a8")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InputError, match="set TRITON_INTERPRET=1"):
        CudaRuntime(program, device="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="no kernel reaches the CUDA device"):
        CudaRuntime(program)


def test_without_triton_it_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "rlquant\[gpu\]"'):
        CudaRuntime(compiled("sac-pendulum", "w8a8"), device=DEVICE)
