"""Agents that the rl-baselines3-zoo authors trained, against stock SB3 loading the same zips (trusted)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rlquant.control import Agent, EnvPool, Session, load, make_env, rollout
from rlquant.control.sb3_zip import read_checkpoint
from rlquant.control.trusted import sb3_class

FOLDER = os.environ.get("RLQUANT_TEST_ZOO")
AGENTS = sorted(str(path.relative_to(FOLDER)) for path in Path(FOLDER).glob("*/*_1")) if FOLDER else []
# sb3-contrib has renamed the layer of ARS' linear policy since this file was written, and cannot load it.
UNREADABLE_BY_SB3 = {"ars/CartPole-v1_1"}
STABLE = ("CartPole", "MountainCar", "Acrobot", "Pendulum", "LunarLander")

pytestmark = pytest.mark.skipif(not AGENTS, reason="RLQUANT_TEST_ZOO does not name a folder of rl-zoo agents")


@pytest.fixture(autouse=True)
def _gym_is_gymnasium(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old pickles name the package gym, whose spaces live on in gymnasium."""
    for name in [name for name in sys.modules if name.split(".")[0] == "gymnasium"]:
        monkeypatch.setitem(sys.modules, name.replace("gymnasium", "gym", 1), sys.modules[name])


def load_stock(agent: Agent, path: Path) -> Any:
    world = make_env(agent.env)
    plain = {"lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0, "learning_rate": 0.0}
    plain |= {"observation_space": world.observation_space, "action_space": world.action_space}
    # Replay buffers and the like hold pickles of retired classes, and play no part in acting.
    plain |= {
        "replay_buffer_class": None,
        "replay_buffer_kwargs": {},
        "_last_obs": None,
        "_last_original_obs": None,
    }
    return sb3_class(agent.algorithm).load(path, device="cpu", custom_objects=plain, buffer_size=1)


def stock_normalise(agent: Agent, folder: Path, observation: np.ndarray) -> np.ndarray:
    """SB3's own VecNormalize, unpickled."""
    files = list(folder.glob("*/vecnormalize.pkl"))
    if not files:
        return observation
    import pickle

    normalise = pickle.loads(files[0].read_bytes())
    if isinstance(normalise.obs_rms, dict):  # the old HER wrapper: observation and goal, one after the other
        parts = np.split(observation, [len(normalise.obs_rms["observation"].mean)], axis=-1)
        keys = ("observation", "desired_goal")
        shown = [normalise._normalize_obs(x, normalise.obs_rms[k]) for x, k in zip(parts, keys, strict=True)]
        return np.concatenate(shown, axis=-1).astype(np.float32)
    return normalise._normalize_obs(observation, normalise.obs_rms).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in AGENTS if name not in UNREADABLE_BY_SB3])
def test_acts_and_scores_as_stock_sb3(name: str, zoo: Path) -> None:
    agent = load(zoo / name)
    checkpoints = [zoo / name / f"{Path(name).name.removesuffix('_1')}.zip", zoo / name / "best_model.zip"]
    stock = load_stock(agent, next(path for path in checkpoints if path.is_file()))
    env = make_env(agent.env)
    session = Session(agent, rows=1)
    stable = Path(name).name.startswith(STABLE)
    returns = []
    for episode in range(2 if stable else 1):
        observation, _ = env.reset(seed=episode)
        total, done, start, steps = 0.0, False, np.ones(1, bool), 0
        while not done and (stable or steps < 200):
            steps += 1
            action, _ = stock.predict(stock_normalise(agent, zoo / name, observation), deterministic=True)
            ours = session.act(observation[None], start)[0]
            np.testing.assert_allclose(ours, action, rtol=0, atol=1e-5)
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            done, start = terminated or truncated, np.zeros(1, bool)
        returns.append(total)
    if stable:
        scored = rollout(agent, range(2), seed=0)
        np.testing.assert_allclose(scored.returns, returns, rtol=1e-4)


def test_linear_ars_policy_of_an_old_version_acts_by_its_matrix(zoo: Path) -> None:
    path = zoo / "ars/CartPole-v1_1"
    agent = load(path)
    matrix = read_checkpoint(path / "CartPole-v1.zip").tensors["action_net.weight"].numpy()
    observations = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    actions = Session(agent, rows=64).act(observations, np.ones(64, bool))
    np.testing.assert_array_equal(actions, (observations @ matrix.T).argmax(axis=1))
    assert rollout(agent, range(5), seed=0).returns.mean() > 400


def test_returns_are_bit_identical_whatever_the_batch_and_workers(zoo: Path) -> None:
    agent = load(zoo / "ppo/LunarLander-v2_1")
    expected = rollout(agent, range(40), seed=11).returns
    for batch, workers in ((1, 1), (7, 1), (33, 1), (128, 2)):
        again = rollout(agent, range(40), seed=11, batch=batch, workers=workers).returns
        np.testing.assert_array_equal(again, expected)
    np.testing.assert_array_equal(rollout(agent, range(13, 29), seed=11).returns, expected[13:29])


def test_retired_ids_are_mapped_to_a_version_with_the_same_spaces(zoo: Path) -> None:
    cheetah = load(zoo / "sac/HalfCheetah-v3_1")
    assert (cheetah.env.id, cheetah.env.requested) == ("HalfCheetah-v5", "HalfCheetah-v3")
    reach = load(zoo / "her/FetchReach-v1_1")
    assert reach.env.id.startswith("FetchReach-v")
    assert reach.env.wrappers == (("FlattenGoal", {}),)
    assert rollout(reach, range(5), seed=0).returns.mean() > -5  # random play scores -50


def test_one_pool_serves_many_precisions(zoo: Path) -> None:
    agent = load(zoo / "ppo/CartPole-v1_1")
    pool = EnvPool(agent.env)
    first = rollout(agent, range(5), seed=0, pool=pool).returns
    np.testing.assert_array_equal(rollout(agent, range(5), seed=0, pool=pool).returns, first)
    assert len(pool.envs) == 5
    assert isinstance(pool.envs[0], gym.Env)
