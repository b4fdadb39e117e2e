"""Runtimes behind one interface: bad observations, rollouts, the bench command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlquant.control import Agent, collect, load, quantize_agent, rollout
from rlquant.control.compile import compile_agent
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
    with pytest.raises(InputError, match="LSTM"):
        compile_agent(load("recurrentppo-cartpole"))


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
