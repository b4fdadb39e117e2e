"""Real time: the wrapper against plain loops that are written by hand, and rollouts against each other."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlquant import catalog
from rlquant.control import Agent, Evaluation, Session, Settings, load, make_env, rollout
from rlquant.control.environment import EnvSpec
from rlquant.control.realtime import Coupling, control_rate, read_latencies
from rlquant.control.settings import RealTimeSettings
from rlquant.errors import InputError

RealTime = catalog.env_module("realtime.py").RealTime


def actions_for(env: gym.Env, count: int) -> list[Any]:
    env.action_space.seed(3)
    return [env.action_space.sample() for _ in range(count)]


def play(env: gym.Env, actions: Iterable[Any], seed: int = 5) -> list[Any]:
    """Everything that the steps of one episode give back."""
    seen = [env.reset(seed=seed)[0]]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append((observation, reward, terminated, truncated, info))
        if terminated or truncated:
            break
    return seen


def assert_same(one: Any, other: Any) -> None:
    np.testing.assert_equal(one, other)


# --- the wrapper


@pytest.mark.parametrize(
    "name", ["CartPole-v1", "LunarLander-v3", "Pendulum-v1", "HalfCheetah-v5", "Humanoid-v5"]
)
def test_without_latency_it_is_the_plain_environment(name: str) -> None:
    plain, real = make_env(EnvSpec(name)), RealTime(make_env(EnvSpec(name)), 0.0, 50)
    actions = actions_for(plain, 60)
    assert_same(play(real, actions), play(plain, actions))


class OneStepLate(gym.Wrapper):
    """The action of each step acts in the next one."""

    def reset(self, **kwargs: Any) -> Any:
        self.held = np.zeros(self.action_space.shape, self.action_space.dtype)
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        held, self.held = self.held, action
        return self.env.step(held)


@pytest.mark.parametrize("name", ["CartPole-v1", "LunarLander-v3", "Pendulum-v1", "Hopper-v5"])
@pytest.mark.parametrize("rate", [20, 30, 50, 70 / 3])
def test_a_latency_of_one_period_is_one_step_of_delay(name: str, rate: float) -> None:
    late, real = OneStepLate(make_env(EnvSpec(name))), RealTime(make_env(EnvSpec(name)), 1e6 / rate, rate)
    actions = actions_for(late, 80)
    if name == "CartPole-v1":
        late.held = 0
    assert_same(play(real, actions), play(late, actions))
    timing = real.timing
    assert timing.taken == timing.seen
    assert timing.late == 0
    assert timing.delay == timing.seen


@pytest.mark.parametrize(("share", "steps_late"), [(0.01, 0), (0.49, 0), (0.51, 1), (0.99, 1), (1.0, 1)])
def test_an_environment_without_substeps_rounds_to_the_nearest_period(share: float, steps_late: int) -> None:
    real = RealTime(make_env(EnvSpec("CartPole-v1")), share * 20_000, 50)
    real.reset(seed=0)
    acted: list[int] = []
    real.unwrapped.step = recording(acted, real.unwrapped.step)
    for action in (1, 1, 0, 1):
        real.step(action)
    assert acted == ([0] * steps_late + [1, 1, 0, 1])[:4]


def recording(acted: list[int], step: Any) -> Any:
    def recorded(action: int) -> Any:
        acted.append(int(action))
        return step(action)

    return recorded


def test_a_busy_policy_misses_observations_and_goes_on_with_the_newest() -> None:
    """L = 2.5 T: observation 2 is half a period old when it is taken, and an action at 2.5 T acts from step 3."""
    real = RealTime(make_env(EnvSpec("Acrobot-v1")), 50_000.0, 50)
    real.reset(seed=0)
    acted: list[int] = []
    real.unwrapped.step = recording(acted, real.unwrapped.step)
    asked = []
    for step in range(12):
        asked.append(real.asks)
        real.step((step + 1) % 3)
    assert [step for step, asks in enumerate(asked) if asks] == [0, 2, 5, 7, 10]
    assert acted == [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2, 2]
    assert (real.timing.seen, real.timing.taken, real.timing.late) == (12, 5, 5)


@pytest.mark.parametrize(
    ("substeps", "name"), [(1, "HalfCheetah-v5"), (3, "HalfCheetah-v5"), (2, "Walker2d-v5")]
)
def test_mujoco_substeps_are_those_of_a_loop_of_mj_step(substeps: int, name: str) -> None:
    """An action ``substeps`` timesteps late, against MuJoCo itself stepped by hand from the same state."""
    mujoco = pytest.importorskip("mujoco")
    real = RealTime(make_env(EnvSpec(name)), 0.0)
    inner = real.unwrapped
    timestep = inner.model.opt.timestep
    real = RealTime(real.env, 1e6 * substeps * timestep)
    real.reset(seed=9)
    model = mujoco.MjModel.from_xml_path(inner.fullpath)
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = inner.data.qpos, inner.data.qvel
    mujoco.mj_forward(model, data)
    held = np.zeros(model.nu)
    for action in actions_for(real, 40):
        real.step(action)
        for substep in range(inner.frame_skip):
            data.ctrl[:] = held if substep < substeps else action
            mujoco.mj_step(model, data)
        held = action
        np.testing.assert_array_equal(inner.data.qpos, data.qpos)
        np.testing.assert_array_equal(inner.data.qvel, data.qvel)
        assert inner.data.time == data.time
    assert real.timing.delay == pytest.approx(40 * substeps / inner.frame_skip)


def test_reward_and_info_are_those_of_the_environments_step() -> None:
    """Forward speed over the whole step, and the cost of the action that acts at its end."""
    real = RealTime(make_env(EnvSpec("HalfCheetah-v5")), 30_000.0)
    real.reset(seed=1)
    for action in actions_for(real, 20):
        before = real.unwrapped.data.qpos[0]
        _, reward, _, _, info = real.step(action)
        forward = (real.unwrapped.data.qpos[0] - before) / 0.05
        assert info["x_velocity"] == pytest.approx(forward)
        assert reward == pytest.approx(forward - 0.1 * float(np.square(action).sum()))


@functools.cache
def hopper() -> gym.Env:
    pytest.importorskip("mujoco")
    return make_env(EnvSpec("Hopper-v5"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 40_000), min_size=1, max_size=6), st.integers(0, 2**31))
def test_simulated_time_is_conserved_and_one_computation_runs_at_a_time(
    latencies: list[float], seed: int
) -> None:
    real = RealTime(hopper(), latencies)
    real.reset(seed=seed)
    period, timestep = 8e-3, 2e-3
    shortest, longest = min(latencies) / 1e6, max(latencies) / 1e6
    for step in range(1, 26):
        expected = real.timing.taken + real.asks
        _, _, terminated, _, _ = real.step(np.full(3, 0.1, np.float32))
        assert real.unwrapped.data.time == pytest.approx(step * period)
        assert (real.timing.seen, real.timing.taken) == (step, expected)
        assert "do_simulation" not in vars(real.unwrapped)
        if terminated:
            break
    timing = real.timing
    assert timing.taken * shortest <= timing.seen * period + longest
    assert timing.taken * max(longest, period) >= (timing.seen - 1) * period - longest - 1e-6
    assert timing.delay * period >= timing.taken * (shortest - timestep / 2) - 1e-6
    assert timing.late == 0 or longest > period


def test_jitter_is_replayed_in_its_order_from_where_the_seed_says() -> None:
    latencies = [0.0, 20_000.0, 40_000.0, 60_000.0, 80_000.0]
    env = make_env(EnvSpec("MountainCar-v0"))

    def asked(seed: int) -> list[bool]:
        real = RealTime(env, latencies, 50)
        real.reset(seed=seed)
        found = []
        for _ in range(30):
            found.append(real.asks)
            real.step(1)
        return found

    # A computation of k periods makes the policy ask again k steps later; one of 0 or 1 at the next step.
    def after(first: int) -> list[bool]:
        found = [False] * 60
        step, index = 0, first
        while step < 30:
            found[step] = True
            step, index = step + max(1, index % 5), index + 1
        return found[:30]

    ways = [after(first) for first in range(5)]
    seen = [asked(seed) for seed in range(12)]
    assert seen == [asked(seed) for seed in range(12)]
    assert all(found in ways for found in seen)
    assert len({tuple(found) for found in seen}) > 2


def test_a_slowdown_multiplies_what_the_chip_takes_but_no_interruption() -> None:
    calls = [10.0, 12.0] * 99 + [10.0, 5_000.0]
    np.testing.assert_array_equal(Coupling(tuple(calls), 1.0, 50.0).slowed_us(), calls)
    slowed = Coupling(tuple(calls), 300.0, 50.0).slowed_us()
    np.testing.assert_allclose(slowed, [3_000.0, 3_600.0] * 99 + [3_000.0, 3_600.0 + 4_988.0])
    np.testing.assert_array_equal(Coupling((7.0,), 300.0, 50.0).slowed_us(), [2_100.0])


def test_an_action_is_what_it_was_when_it_was_given() -> None:
    """Callers may write the next action into the same array while the first one is on its way."""
    env = make_env(EnvSpec("Pendulum-v1"))
    actions = actions_for(env, 30)
    separate = play(RealTime(env, 60_000.0, 20), actions)
    shared = np.zeros_like(actions[0])

    def written_over() -> Any:
        for action in actions:
            shared[:] = action
            yield shared

    assert_same(play(RealTime(env, 60_000.0, 20), written_over()), separate)


def test_an_action_that_others_change_on_its_way_is_delayed_by_whole_steps() -> None:
    env = gym.wrappers.RescaleAction(gym.make("HalfCheetah-v5"), -2.0, 2.0)
    late, real = OneStepLate(gym.make("HalfCheetah-v5")), RealTime(env, 40_000.0)
    actions = actions_for(real, 20)
    assert_same(play(real, actions), play(late, [action / 2 for action in actions]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), 50), "latencies must be"),
        (((-1.0,), 50), "latencies must be"),
        ((float("nan"), 50), "latencies must be"),
        (((1.0,), 0), "control rate must be a positive number, not 0"),
        (((1.0,), float("nan")), "control rate must be a positive number"),
        (((1.0,),), "does not say how many steps make a second"),
    ],
)
def test_what_cannot_be_replayed_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        RealTime(make_env(EnvSpec("CartPole-v1")), *arguments)


# --- rollouts

JITTER = (3_000.0, 25_000.0, 70_000.0, 11_000.0, 55_000.0, 38_000.0)


@pytest.fixture(scope="module")
def recurrent() -> Agent:
    return load("recurrentppo-cartpole")


def stacked_agent() -> Agent:
    torch.manual_seed(0)
    return Agent.from_module(torch.nn.Linear(6, 1), env="Pendulum-v1", frame_stack=2)


AGENTS = {
    "plain": lambda: load("ppo-cartpole"),
    "recurrent": lambda: load("recurrentppo-cartpole"),
    "stacked": stacked_agent,
}


@pytest.mark.parametrize("runtime", ["torch", "reference"])
@pytest.mark.parametrize("name", AGENTS)
def test_returns_do_not_depend_on_the_batch(name: str, runtime: str) -> None:
    """Episodes run out of step with each other: some act while others miss what they see."""
    agent, coupling = AGENTS[name](), Coupling(JITTER, 1.0, 50.0)

    def played(numbers: range, **how: Any) -> Any:
        return rollout(agent, numbers, seed=3, coupling=coupling, runtime=runtime, **how)

    whole = played(range(10))
    assert (whole.timing[:, 1] < whole.timing[:, 0]).all()
    assert (whole.timing[:, 0] == whole.lengths).all()
    for batch in (1, 3):
        part = played(range(10), batch=batch)
        assert_same((part.returns, part.timing), (whole.returns, whole.timing))
    assert_same(played(range(4, 7)).returns, whole.returns[4:7])


@pytest.mark.slow
def test_returns_do_not_depend_on_the_workers(recurrent: Agent) -> None:
    alone, shared = (
        rollout(recurrent, range(6), seed=3, coupling=Coupling(JITTER, 1.0, 50.0), workers=workers)
        for workers in (1, 2)
    )
    assert_same((shared.returns, shared.timing), (alone.returns, alone.timing))


def test_without_latency_a_rollout_is_the_plain_one(recurrent: Agent) -> None:
    plain = rollout(recurrent, range(6), seed=0)
    real = rollout(recurrent, range(6), seed=0, coupling=Coupling((0.0,), 1.0, 50.0))
    assert_same((real.returns, real.lengths), (plain.returns, plain.lengths))
    assert plain.timing.shape == (6, 0)
    assert (real.timing[:, 3] == 0).all()


@pytest.mark.parametrize("name", ["recurrent", "stacked"])
@pytest.mark.parametrize("runtime", ["torch", "reference"])
def test_memory_moves_only_with_what_the_policy_takes(name: str, runtime: str) -> None:
    """A hand-written loop that shows the policy every second observation, as L = 2 T does."""
    agent = AGENTS[name]()
    coupling = Coupling((2e6 / 50,), 1.0, 50.0)
    real = rollout(agent, range(3), seed=0, coupling=coupling, runtime=runtime)
    env = make_env(agent.env)
    for episode in range(3):
        session = Session(agent, rows=1)
        observation, _ = env.reset(seed=episode)
        acting = arriving = np.zeros_like(env.action_space.sample())
        total, done, step = 0.0, False, 0
        while not done:
            if step % 2 == 0:
                acting = arriving
                arriving = session.act(observation[None], np.array([step == 0]))[0]
            observation, reward, terminated, truncated, _ = env.step(acting)
            total, done, step = total + reward, terminated or truncated, step + 1
        assert real.returns[episode] == pytest.approx(total, rel=1e-4)
    assert (real.timing[:, 1] == np.ceil(real.timing[:, 0] / 2)).all()


# --- what enters


def test_the_control_rate_is_the_cards() -> None:
    assert control_rate(EnvSpec("HalfCheetah-v5")) == 20.0
    assert control_rate(EnvSpec("HalfCheetah-v5"), 40.0) == 40.0
    for spec in (EnvSpec("Blackjack-v1"), EnvSpec("HalfCheetah-v5", {"frame_skip": 1})):
        with pytest.raises(InputError, match="--control-rate 50"):
            control_rate(spec)


def test_latencies_are_read_from_a_duration_or_a_file(tmp_path: Any) -> None:
    path = tmp_path / "latencies.json"
    assert read_latencies("2ms") == {"": (pytest.approx(2000.0),)}
    path.write_text("[1, 2.5]")
    assert read_latencies(str(path)) == {"": (1.0, 2.5)}
    path.write_text('{"fp32-none": [3], "int8-rtn": [1, 2]}')
    assert read_latencies(str(path)) == {"fp32-none": (3.0,), "int8-rtn": (1.0, 2.0)}
    for content in ("{}", "[]", "[-1]", '["x"]', "5", '{"a": 1}', "[NaN]", "no json", '{"a": []}'):
        path.write_text(content)
        with pytest.raises(InputError, match="neither a duration"):
            read_latencies(str(path))
    for text in ("0ms", "soon", "5 parsecs", str(tmp_path / "none.json")):
        with pytest.raises(InputError, match="--latency"):
            read_latencies(text)


# --- the command


def test_the_command_shows_return_against_slowdown_and_repeats_itself(
    rlquant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "ppo-cartpole", "--precisions", "w8a8", "--episodes", 8, "--realtime"]
    done = rlquant(*command, "--slowdown", "1,50000", "--out", "one")
    assert done.status == 0, done.err
    first = json.loads(Path("one/results.json").read_text())
    for row in first["rows"]:
        quick, slow = row["realtime"]
        assert (quick["slowdown"], slow["slowdown"]) == (1.0, 50_000.0)
        assert quick["score"]["episodes"] == row["score"]["episodes"]
        assert (quick["delay_periods"], quick["missed"]) == (0.0, 0.0)
        assert slow["delay_periods"] > 0
        assert slow["latency_us"]["p50"] == pytest.approx(50_000 * quick["latency_us"]["p50"])
    settings_before = first["settings"]
    Path("one/results.json").unlink()
    assert rlquant(*command, "--slowdown", "1,50000", "--out", "one").status == 0
    again = json.loads(Path("one/results.json").read_text())
    assert [row["realtime"] for row in again["rows"]] == [row["realtime"] for row in first["rows"]]
    given = ["--slowdown", "1,50000", "--latency", "one/latencies.json", "--out", "two"]
    assert rlquant(*command, *given).status == 0
    replayed = json.loads(Path("two/results.json").read_text())
    assert [row["realtime"] for row in replayed["rows"]] == [row["realtime"] for row in first["rows"]]
    assert settings_before["realtime"]["latency"] == "measured"
    assert replayed["settings"]["realtime"]["latency"].startswith("given")


def test_delay_costs_reward_and_the_verdict_says_so(rlquant: Any, tmp_path: Path) -> None:
    done = rlquant(
        *("evaluate", "ppo-cartpole", "--precisions", "fp32", "--episodes", 8, "--realtime"),
        *("--latency", "30ms", "--slowdown", "0.01,2", "--out", tmp_path),
    )
    assert done.status == 0, done.err
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    quick, slow = row["realtime"]
    assert (quick["retention"]["verdict"], slow["retention"]["verdict"]) == ("retained", "lost")
    assert slow["score"]["mean"] < 100
    assert (slow["late"], slow["control_rate_hz"]) == (1.0, 50.0)
    assert 15 < slow["actions_hz"] < 19  # 1 / 60 ms
    assert not (tmp_path / "latencies.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slowdown", "200"], "add --realtime: without it, --slowdown would"),
        (["--latency", "2ms", "--control-rate", 5], "--latency and --control-rate would change nothing"),
        (["--realtime", "--slowdown", "1,0"], "--slowdown must be positive, not 0"),
        (["--realtime", "--slowdown", "-3"], "--slowdown must be positive, not -3"),
        (["--realtime", "--slowdown", "nan"], "--slowdown must be positive, not nan"),
        (["--realtime", "--slowdown", "1;50"], "no list of numbers"),
        (["--realtime", "--control-rate", "0"], "--control-rate must be positive"),
        (["--realtime", "--latency", "2 parsecs"], "--latency '2 parsecs'"),
    ],
)
def test_options_that_make_no_sense(rlquant: Any, tmp_path: Path, options: list[Any], message: str) -> None:
    done = rlquant("evaluate", "ppo-cartpole", *options, "--out", tmp_path / "run")
    assert done.status == 2
    assert message in done.err
    assert not (tmp_path / "run").exists()


def test_latencies_of_other_rows_are_refused(rlquant: Any, tmp_path: Path) -> None:
    path = tmp_path / "latencies.json"
    path.write_text('{"int8-rtn": [5.0]}')
    done = rlquant(
        *("evaluate", "ppo-cartpole", "--precisions", "int8", "--episodes", 2, "--realtime"),
        *("--latency", path, "--out", tmp_path / "run"),
    )
    assert done.status == 2
    assert "no latencies of fp32-none; it has those of int8-rtn" in done.err


def test_an_agent_that_masks_actions_cannot_be_late() -> None:
    agent = dataclasses.replace(load("ppo-cartpole"), masked=True)
    with pytest.raises(InputError, match="may be forbidden by then"):
        Evaluation(agent, Settings(realtime=RealTimeSettings()))
