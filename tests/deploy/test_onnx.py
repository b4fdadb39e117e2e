"""Programs in ONNX: ONNX Runtime and onnx.reference give the reference's bits."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_programs import memories, observations, programs
from shipped import SHIPPED

from rlquant.control import Agent, collect, load, quantize_agent
from rlquant.control.compile import compile_agent
from rlquant.deploy import reference
from rlquant.deploy.floats import ACTIVATIONS
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.onnx_graph import STATE, build_model, input_names
from rlquant.deploy.onnx_runtime import OnnxRuntime, export_onnx
from rlquant.deploy.program import Activate, Affine, Buffer, Linear, Program, Weight
from rlquant.errors import InputError

onnx = pytest.importorskip("onnx")
onnx_reference = pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime")

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
pytestmark = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of onnx.reference, on extremes
hypothesis_settings = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@cache
def compiled(name: str, scheme: str) -> Program:
    agent = load(name)
    return compile_agent(agent if scheme == "fp32" else quantized(agent, name, scheme))


def quantized(agent: Agent, name: str, scheme: str) -> Agent:
    return quantize_agent(agent, scheme, inputs=calibration(name))


@cache
def calibration(name: str) -> Any:
    return collect(load(name), 1, seed=5, limit=1000)


def shown(x: dict[str, np.ndarray]) -> Any:
    """As the environment shows it."""
    return x[""] if set(x) == {""} else x


def run_model(
    model: Any,
    program: Program,
    x: dict[str, np.ndarray],
    level: str = LEVELS[-1],
    states: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Outputs and actions, in a plain session such as a user's."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[np.ndarray] = session.run(None, feed(program, x, states))
    return found


def feed(
    program: Program, x: dict[str, np.ndarray], states: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    given = {name: x[key] for key, name in input_names(program).items()}
    if program.states and states is None:
        states = np.zeros((len(next(iter(x.values()))), program.state_size), np.float32)
    return given | {STATE: states} if program.states else given


def assert_same_bits(given: np.ndarray, expected: np.ndarray) -> None:
    assert given.dtype == expected.dtype
    np.testing.assert_array_equal(given.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w2a4"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_agents_give_the_bits_of_the_reference(name: str, scheme: str) -> None:
    program = compiled(name, scheme)
    assert program.is_integer
    x = observations(program, 1_000 if name == "cnn-catch" else 10_000)
    states = memories(program, len(next(iter(x.values()))))
    start, before, after = states.copy(), states.copy(), states.copy()
    expected = reference.run(program, x, after)
    runtime = OnnxRuntime(program)
    assert_same_bits(runtime.outputs(shown(x), states), expected)
    assert_same_bits(states, after)
    np.testing.assert_array_equal(runtime.act_batch(shown(x), states=before), program.head(expected))
    for level in LEVELS:  # whoever loads the file may leave all optimisations on
        outputs, actions, *_ = run_model(build_model(program), program, x, level, start)
        assert_same_bits(outputs, expected)
        np.testing.assert_array_equal(actions, program.head(expected))


@hypothesis_settings
@given(programs())
def test_any_program_gives_the_bits_of_the_reference(program: Program) -> None:
    x = observations(program, 10_000 if program.buffers[0].size < 20 else 1_000)
    states = memories(program, len(next(iter(x.values()))))
    before, after = states.copy(), states.copy()
    expected = reference.run(program, x, after)
    runtime = OnnxRuntime(program)
    assert_same_bits(runtime.outputs(shown(x), states), expected)
    assert_same_bits(states, after)
    np.testing.assert_array_equal(runtime.act_batch(shown(x), states=before), program.head(expected))


@hypothesis_settings
@given(programs(widest=12))
def test_onnx_reference_agrees(program: Program) -> None:
    """The evaluator of the ONNX project, which shares no code with ONNX Runtime."""
    x, states = observations(program, 40), memories(program, 40)
    given = feed(program, x, states.copy())
    expected = reference.run(program, x, states)
    outputs, actions, *kept = onnx_reference.ReferenceEvaluator(build_model(program)).run(None, given)
    assert_same_bits(outputs, expected)
    for after in kept:
        assert_same_bits(after, states)
    np.testing.assert_array_equal(actions, program.head(expected))


@hypothesis_settings
@given(programs(), st.integers(0, 2**32 - 1))
def test_one_observation_at_a_time_is_as_a_batch(program: Program, seed: int) -> None:
    x = observations(program, 20, seed)
    runtime = OnnxRuntime(program)
    expected = runtime.act_batch(shown(x))
    for row in range(20):
        runtime.reset()
        action = runtime.act(shown({key: part[row] for key, part in x.items()}))
        np.testing.assert_array_equal(action, expected[row])
        assert action.dtype == expected.dtype


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("scheme", ["fp32", "int4", "int8-g32"])
def test_float_programs_agree_up_to_rounding(name: str, scheme: str) -> None:
    program = compiled(name, scheme)
    x = {key: np.clip(part, -5, 5) for key, part in observations(program, 200).items()}
    expected = reference.run(program, x)
    given = OnnxRuntime(program).outputs(shown(x))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    evaluated = onnx_reference.ReferenceEvaluator(build_model(program)).run(["outputs"], feed(program, x))[0]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_on_floats_are_torchs(kind: str) -> None:
    import torch

    program = Program(
        (Buffer(7), Buffer(7)), {"": (7,)}, (Activate(0, 1, kind),), ProgramHead("argmax", 7), "activation"
    )
    x = np.linspace(-9, 9, 700, dtype=np.float32).reshape(100, 7)
    expected = getattr(torch.nn, kind)()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(OnnxRuntime(program).outputs(x), expected, rtol=1e-5, atol=3e-6)


def test_weights_whose_pairs_would_saturate_sixteen_bits_are_exact() -> None:
    """255 * 127 * 2 exceeds int16: what products of uint8 and int8 do on CPUs without VNNI."""
    columns, rows = 64, 8
    signs = np.random.default_rng(0).choice([-127, 127], (rows, columns)).astype(np.int8)
    weight = Weight(rows, columns, 8, signs.view(np.uint8).ravel())
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    to_grid = Affine(0, 1, one, zero, zero, zero + 255)
    product = Linear(1, 2, weight, np.zeros(rows, np.float32), np.ones((rows, 1), np.float32), columns)
    head = ProgramHead("argmax", rows)
    program = Program(
        (Buffer(columns), Buffer(columns, 8), Buffer(rows)), {"": (columns,)}, (to_grid, product), head
    )
    stored = [onnx.numpy_helper.to_array(x) for x in build_model(program).graph.initializer]
    assert not [x for x in stored if x.dtype == np.int8]
    outputs = OnnxRuntime(program).outputs(np.full((1, columns), 255, np.float32))
    np.testing.assert_array_equal(outputs[0], 255.0 * signs.sum(axis=1))


def test_masked_choices_are_never_taken() -> None:
    program = compiled("ppo-lunarlander", "w8a8")
    x = observations(program, 500)
    masks = np.random.default_rng(0).random((500, 4)) < 0.5
    masks[:, 1] |= ~masks.any(axis=1)
    runtime = OnnxRuntime(program)
    expected = np.where(masks, reference.run(program, x), -np.inf).argmax(axis=1)
    np.testing.assert_array_equal(runtime.act_batch(x[""], masks), expected)
    assert [runtime.act(x[""][row], masks[row]) for row in range(50)] == expected[:50].tolist()
    model = build_model(program, masked=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actions = session.run(["action"], {**feed(program, x), "masks": masks})[0]
    np.testing.assert_array_equal(actions, expected)


def test_exported_file_is_checked_small_and_tells_what_it_is(tmp_path: Path) -> None:
    program = compiled("ppo-cartpole", "w8a8")
    path = tmp_path / "policy.onnx"
    size = export_onnx(program, path, metadata={"env": "CartPole-v1", "precision": "w8a8"})
    assert [file.name for file in tmp_path.iterdir()] == ["policy.onnx"]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["env"] == "CartPole-v1"
    assert metadata["precision"] == "w8a8"
    assert size == path.stat().st_size < 1.3 * program.nbytes
    assert [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        4,
    ]
    first = path.read_bytes()
    export_onnx(program, path, metadata={"env": "CartPole-v1", "precision": "w8a8"})
    assert path.read_bytes() == first


def test_large_finite_doubles_saturate_like_infinity() -> None:
    program = compiled("ppo-cartpole", "w8a8")
    runtime = OnnxRuntime(program)
    infinite = np.array([np.inf, -np.inf, 0, 1])
    assert runtime.act(infinite.clip(-1e300, 1e300)) == runtime.act(infinite)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.array([0, np.nan, 0, 0], np.float32), "NaN"),
        (np.zeros(5, np.float32), r"shape \[5\].*takes \[4\]"),
        (np.zeros((1, 4), np.float32), r"shape \[1, 4\].*takes \[4\]"),
        (np.array(["a", "b", "c", "d"]), "dtype"),
        ({"goal": np.zeros(4, np.float32)}, "keys"),
    ],
)
def test_what_is_no_observation_is_refused(observation: Any, message: str) -> None:
    runtime = OnnxRuntime(compiled("ppo-cartpole", "w8a8"))
    with pytest.raises(InputError, match=message):
        runtime.act(observation)
    batch = {key: part[None] for key, part in observation.items()} if isinstance(observation, dict) else None
    with pytest.raises(InputError):
        runtime.outputs(observation[None] if batch is None else batch)
    assert runtime.act(np.zeros(4, np.float32)) in (0, 1)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_package_names_the_extra(package: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
import numpy as np
from rlquant.deploy.floats import ACTIVATIONS
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.onnx_runtime import OnnxRuntime
from rlquant.deploy.program import Activate, Buffer, Program
from rlquant.errors import InputError
program = Program((Buffer(2), Buffer(2)), {{"": (2,)}}, (Activate(0, 1, "ReLU"),), ProgramHead("argmax", 2))
try: OnnxRuntime(program)
except InputError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"the package {package}:" in done.stdout
    assert 'pip install "rlquant[onnx]"' in done.stdout
