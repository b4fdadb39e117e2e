"""Runtimes side by side: who enters, what is measured, and what is said of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3 as sb3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rlquant import catalog
from rlquant.control import EnvPool, Quantizer, load
from rlquant.control.collect import raw_observations
from rlquant.control.contest import contest, enter
from rlquant.control.program_session import actor_in
from rlquant.control.sb3_predict import predict_in_sb3
from rlquant.errors import InputError
from rlquant.report import bench_lines, bench_table

Run = Callable[..., Any]


@pytest.fixture
def unknown(tmp_path: Path) -> str:
    """The path of a checkpoint that is not shipped."""
    sb3.PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0).save(tmp_path / "mine.zip")
    return str(tmp_path / "mine.zip")


def quantizer_of(source: str, **options: Any) -> Quantizer:
    agent = load(source, **options)
    return Quantizer(agent, EnvPool(agent.env), seed=0)


def test_stock_sb3_enters_once_and_in_fp32() -> None:
    entered, left_out = enter(quantizer_of("ppo-cartpole"), ("fp32", "w8a8"), ("reference", "sb3", "native"))
    assert [(each.precision, each.runtime, each.simulated) for each in entered] == [
        ("fp32", "sb3", False),
        ("fp32", "reference", False),
        ("fp32", "native", False),
        ("w8a8", "reference", False),
        ("w8a8", "native", False),
    ]
    assert not left_out


def test_the_code_of_a_stranger_runs_only_if_trusted(unknown: str) -> None:
    quantizer = quantizer_of(unknown, env="CartPole-v1")
    entered, left_out = enter(quantizer, ("fp32",), ("sb3", "reference"))
    assert [each.runtime for each in entered] == ["reference"]
    assert "sb3 is left out: SB3 unpickles a checkpoint" in left_out[0]
    assert "--trust" in left_out[0]
    entered, left_out = enter(quantizer, ("fp32",), ("sb3", "reference"), trust=True)
    assert [each.runtime for each in entered] == ["sb3", "reference"]


def test_an_artifact_is_no_sb3_checkpoint(tmp_path: Path, rlquant: Run) -> None:
    assert rlquant("quantize", "ppo-cartpole", "--scheme", "int8", "--out", tmp_path).status == 0
    with pytest.raises(InputError, match="is no SB3 checkpoint"):
        predict_in_sb3(load(tmp_path), trust=True)


def test_sb3_predicts_from_what_the_environment_shows(tmp_path: Path) -> None:
    """Normalised, as SB3's own ``VecNormalize`` does beside the model."""
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    model = sb3.PPO("MlpPolicy", env, n_steps=64, seed=0, device="cpu").learn(256)
    model.save(tmp_path / "mine.zip")
    env.save(str(tmp_path / "vecnormalize.pkl"))
    env.training = False
    agent = load(tmp_path / "mine.zip", env="Pendulum-v1", normaliser=tmp_path / "vecnormalize.pkl")
    act = predict_in_sb3(agent, trust=True)
    for observation in raw_observations(agent, seed=0, count=20):
        expected, _ = model.predict(env.normalize_obs(observation), deterministic=True)
        assert abs(expected).max() > 0
        np.testing.assert_allclose(act(observation), expected, atol=1e-6)


def test_old_checkpoints_run_in_sb3_too(zoo: Path) -> None:
    """Their pickles name modules that are gone."""
    agent = load(zoo / "tqc/Hopper-v3_1")
    ours = actor_in(agent, "torch")
    act = predict_in_sb3(agent, trust=True)
    for observation in raw_observations(agent, seed=0, count=20):
        np.testing.assert_allclose(act(observation), ours(observation), atol=1e-5)


def test_sb3_remembers_as_its_own_loop_does() -> None:
    agent = load("recurrentppo-cartpole")
    observations = raw_observations(agent, seed=0, count=30)
    act = predict_in_sb3(agent)
    model = sb3_contrib.RecurrentPPO.load(
        catalog.agent_folder("recurrentppo-cartpole") / "agent.zip", device="cpu"
    )
    state, start, expected = None, np.zeros(1, bool), []
    for observation in observations:
        action, state = model.predict(observation, state=state, episode_start=start, deterministic=True)
        expected.append(int(action))
    assert [int(act(observation)) for observation in observations] == expected


def test_what_is_measured_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    quantizer = quantizer_of("ppo-lunarlander")
    entered, _ = enter(quantizer, ("fp32", "w8a8"), ("sb3", "native", "reference"))
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    timed = contest(quantizer, entered, calls=150)
    assert cores is None or os.sched_getaffinity(0) == cores
    assert timed.control_rate_hz == 50
    for each in timed.timings:
        assert each.latency.calls == 149  # all but the first
        assert each.jitter_us == each.latency.p99 - each.latency.p50 >= 0
        assert each.cold_us > 0
        assert 0 <= (each.misses or 0) <= 1
        # Only the C runtimes allocate nothing but the action, in any precision.
        assert each.allocation.only_action is (each.runtime == "native")
        assert each.allocation.calls == 150
    assert timed.machine.core is None or timed.machine.core in (cores or ())
    lines = " ".join(bench_lines(timed))
    assert "fp32 native, w8a8 native allocate nothing but the action" in lines
    assert "control period of 20 ms (50 Hz)" in lines
    assert bench_table(timed, 80).row_count == 5


def test_the_command_writes_what_it_shows(rlquant: Run, tmp_path: Path) -> None:
    options = ("--precisions", "w8a8", "--runtimes", "sb3,native", "--calls", 120, "--no-pin")
    done = rlquant("bench", "ppo-cartpole", *options, "--out", tmp_path)
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(each["precision"], each["runtime"]) for each in found["timings"]] == [
        ("fp32", "sb3"),
        ("w8a8", "native"),
    ]
    assert found["state"]["core"] is None
    assert found["state"]["cores"] >= 1
    assert "not pinned to a core" in done.out
    assert found["timings"][0]["speedup"] == 1
    assert found["timings"][1]["allocation"]["blocks_kept"] < 120
