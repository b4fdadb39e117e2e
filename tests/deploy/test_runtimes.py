"""Runtimes behind one interface: bad observations, rollouts, the bench command."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from rlquant.control import Agent, Session, collect, from_sb3, load, quantize_agent, rollout
from rlquant.control.actor import Actor
from rlquant.control.compile import compile_agent
from rlquant.control.environment import EnvSpec
from rlquant.deploy.runtime import ReferenceRuntime, make_runtime
from rlquant.errors import InputError

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def pendulum() -> Agent:
    agent = load("sac-pendulum")
    return quantize_agent(agent, "w8a8", inputs=collect(agent, 2, seed=1))


def test_one_observation_and_a_batch_act_alike(pendulum: Agent) -> None:
    runtime = ReferenceRuntime(compile_agent(pendulum))
    observations = np.random.default_rng(0).normal(0, 1, (7, 3)).astype(np.float32)
    actions = runtime.act_batch(observations)
    assert actions.shape == (7, 1)
    assert actions.dtype == np.float32
    np.testing.assert_array_equal(np.stack([runtime.act(x) for x in observations]), actions)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.array([0, np.nan, 0], np.float32), "holds NaN; no action was taken"),
        (np.zeros(4, np.float32), r"shape \[4\]; this policy takes \[3\]"),
        (np.zeros((1, 3), np.float32), r"shape \[1, 3\]"),
        (np.array(["a", "b", "c"]), "takes numbers"),
        ({"position": np.zeros(3)}, r"keys \['position'\]; this policy takes \[''\]"),
    ],
)
def test_bad_observations_are_refused(pendulum: Agent, observation: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReferenceRuntime(compile_agent(pendulum)).act(observation)


def test_infinities_saturate(pendulum: Agent) -> None:
    runtime = ReferenceRuntime(compile_agent(pendulum))
    infinite, large = (np.array([x, -x, x], np.float32) for x in (np.inf, 1e30))
    np.testing.assert_array_equal(runtime.act(infinite), runtime.act(large))


def test_an_unknown_runtime(pendulum: Agent) -> None:
    with pytest.raises(InputError, match="Did you mean 'native'"):
        make_runtime("natve", compile_agent(pendulum))


def test_episodes_in_a_runtime_score_as_in_torch(pendulum: Agent) -> None:
    # A network of ReLUs: its program differs from torch by float rounding alone.
    in_torch, in_program = (
        rollout(pendulum, range(6), seed=0, runtime=name).returns for name in ("torch", "reference")
    )
    np.testing.assert_allclose(in_program, in_torch, rtol=0.02)


def test_what_cannot_be_compiled_is_named() -> None:
    agent = load("ppo-cartpole")
    with pytest.raises(InputError, match=r"-dynamic\) cannot be compiled .* torch can run it"):
        compile_agent(quantize_agent(agent, "w8a8-dynamic"))


def test_the_bench_command(rlquant: Run, tmp_path: Path) -> None:
    options = ("--precisions", "fp32,w8a8", "--runtimes", "torch,reference", "--calls", 200)
    done = rlquant("bench", "sac-pendulum", *options, "--out", tmp_path)
    assert done.status == 0
    timings = json.loads((tmp_path / "bench.json").read_text())["timings"]
    assert [(each["precision"], each["runtime"]) for each in timings] == [
        ("fp32", "torch"),
        ("fp32", "reference"),
        ("w8a8", "torch"),
        ("w8a8", "reference"),
    ]
    assert [each["latency"]["simulated"] for each in timings] == [False, False, True, False]
    assert all(
        0 < each["latency"]["p50"] <= each["latency"]["p99"] <= each["latency"]["max"] for each in timings
    )
    assert all(0 <= each["misses"] <= 1 for each in timings)
    assert timings[0]["speedup"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runtimes", "gpu"), "unknown runtime 'gpu'"),
        (("--calls", 3), "--calls must be at least 100, not 3"),
        (("--precisions", "w8a9z"), "w8a9z"),
    ],
)
def test_bad_bench_options(rlquant: Run, tmp_path: Path, options: tuple[str, Any], message: str) -> None:
    done = rlquant("bench", "sac-pendulum", *options, "--out", tmp_path)
    assert done.status == 2
    assert message in done.err


@pytest.mark.parametrize("name", ["reference", "native", "onnx"])
def test_what_is_remembered(name: str) -> None:
    agent = load("recurrentppo-cartpole")
    program = compile_agent(quantize_agent(agent, "w8a8", inputs=collect(agent, 1, seed=1)))
    runtime = make_runtime(name, program)
    episodes = np.random.default_rng(0).normal(0, 1, (3, 20, *program.inputs[""])).astype(np.float32)
    states = np.zeros((3, program.state_size), np.float32)
    side_by_side = [runtime.act_batch(episodes[:, step], states=states) for step in range(20)]
    for number, episode in enumerate(episodes):
        runtime.reset()
        one_by_one = [runtime.act(observation) for observation in episode]
        np.testing.assert_array_equal(one_by_one, [actions[number] for actions in side_by_side])
    with pytest.raises(InputError, match=rf"writable float32 array \[3, {program.state_size}\], not float64"):
        runtime.act_batch(episodes[:, 0], states=states.astype(np.float64))


def test_an_observation_that_is_refused_is_not_remembered() -> None:
    program = compile_agent(load("recurrentppo-cartpole"))
    first, second = np.random.default_rng(0).normal(0, 1, (2, *program.inputs[""])).astype(np.float32)
    for name in ("reference", "native", "onnx"):
        runtime = make_runtime(name, program)
        for observation in (first, np.full_like(first, np.nan), second):
            with suppress(InputError):
                runtime.act(observation)
        states = np.zeros((1, program.state_size), np.float32)
        runtime.outputs(first[None], states)
        expected = runtime.outputs(second[None], states)
        runtime.reset()
        runtime.act(first)
        with suppress(InputError):
            runtime.act(np.full_like(first, np.nan))
        np.testing.assert_array_equal(runtime.act(second), program.head(expected)[0])


class Corridor(gym.Env[Any, Any]):
    """Choices as observations: a place, and a pair of signs beside it."""

    observation_space = gym.spaces.Dict(
        place=gym.spaces.Discrete(7), signs=gym.spaces.MultiDiscrete([2, 5]), lamps=gym.spaces.MultiBinary(3)
    )
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, True, False, {}


@pytest.mark.parametrize("scheme", ["fp32", "w8a8"])
def test_choices_become_one_hot_codes(scheme: str) -> None:
    gym.register("Corridor-v0", Corridor)
    model = PPO("MultiInputPolicy", gym.make("Corridor-v0"), policy_kwargs={"net_arch": [8]}, seed=0)
    agent = from_sb3(model, env=EnvSpec("Corridor-v0"))
    quantized = quantize_agent(agent, scheme, inputs=collect(agent, 40, seed=1))
    program = compile_agent(quantized)
    Corridor.observation_space.seed(3)
    shown = [Corridor.observation_space.sample() for _ in range(64)]
    batch = {key: np.stack([each[key] for each in shown]) for key in program.inputs}
    session = Session(quantized, 64)
    actions = session.act(batch, np.ones(64, bool))
    for name in ("reference", "native", "onnx"):
        runtime = make_runtime(name, program)
        np.testing.assert_allclose(runtime.outputs(batch), session.outputs[:64], atol=0.02)
        np.testing.assert_array_equal([runtime.act(each) for each in shown], runtime.act_batch(batch))
    if scheme == "fp32":
        np.testing.assert_array_equal(actions, model.predict(batch, deterministic=True)[0])
        np.testing.assert_array_equal(actions, runtime.act_batch(batch))


@pytest.mark.parametrize("cell", [torch.nn.LSTM, torch.nn.GRU])
@pytest.mark.parametrize("scheme", [None, "w8a8", "int4-g8"])
def test_two_recurrent_layers_are_torchs(cell: Any, scheme: str | None) -> None:
    torch.manual_seed(0)
    rnn = cell(6, 9, num_layers=2)
    trunk = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1))
    agent = load("sac-pendulum")
    encoders = {"": torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh())}
    actor = Actor(encoders, trunk, rnn)
    for parameter in actor.parameters():
        parameter.data *= 2.5  # so that what was seen makes a difference
    agent = replace(agent, actor=actor)
    if scheme is not None:
        agent = quantize_agent(agent, scheme, inputs=collect(agent, 1, seed=1))
    session, runtime = Session(agent, 4), make_runtime("reference", compile_agent(agent))
    states = np.zeros((4, runtime.program.state_size), np.float32)
    for step, x in enumerate(np.random.default_rng(0).normal(0, 1, (30, 4, 3)).astype(np.float32)):
        session.act(x, np.full(4, step == 0))
        outputs = runtime.outputs(x, states)
    error = np.abs(outputs - session.outputs[:4]).max()
    assert error < (0.1 if scheme == "w8a8" else 1e-5) * np.ptp(outputs)
    assert np.ptp(outputs) > 0.05
