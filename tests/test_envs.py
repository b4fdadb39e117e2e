"""Environment cards say what is so; the custom environments keep Gymnasium's contract."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env

from rlquant.control import EnvSpec, make_env

ENVS = Path(__file__).resolve().parent.parent / "envs"
CARDS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(ENVS.glob("*.yml"))}
KEYS = {
    "id", "description", "make", "module", "requires", "control_rate_hz", "control_rate_source",
    "max_episode_steps", "random_score", "trained_score", "solved_at",
}  # fmt: skip


def run_module(name: str) -> ModuleType:
    """Execute a single-file environment by its path, as users of the cards do."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ENVS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(card: dict) -> gym.Env:
    if card["requires"] == "mujoco":
        pytest.importorskip("mujoco")
    return make_env(EnvSpec(card["make"]["id"], card["make"]["kwargs"]))


def test_the_cards_are_there() -> None:
    assert len(CARDS) >= 17


@pytest.mark.parametrize("name", CARDS)
def test_card_matches_the_schema(name: str) -> None:
    card = CARDS[name]
    assert set(card) == KEYS
    assert card["id"] == name
    assert set(card["make"]) == {"id", "kwargs"}
    assert card["module"] is None or (ENVS / card["module"]).is_file()
    assert card["requires"] in (None, "mujoco")
    assert isinstance(card["control_rate_hz"], float)
    assert 1 <= card["control_rate_hz"] <= 1000
    assert len(card["control_rate_source"]) > 10
    assert card["solved_at"] is None or isinstance(card["solved_at"], float)
    random, trained = card["random_score"], card["trained_score"]
    assert set(random) == {"mean", "std", "episodes", "seed"}
    assert random["episodes"] >= 100
    if trained is not None:
        assert set(trained) == {"mean", "agent"}
        assert trained["mean"] > random["mean"] + 2 * random["std"] / random["episodes"] ** 0.5
        agent = yaml.safe_load((ENVS.parent / "agents" / trained["agent"] / "card.yml").read_text())
        assert agent["env"] == name
        assert agent["score"]["mean"] == trained["mean"]


@pytest.mark.parametrize("name", CARDS)
def test_card_agrees_with_the_environment(name: str) -> None:
    card = CARDS[name]
    env = make(card)
    assert env.spec is not None
    inner = env.unwrapped
    steps = env.spec.max_episode_steps or getattr(inner, "episode_steps", None)
    assert card["max_episode_steps"] == steps
    threshold = env.spec.reward_threshold
    if card["module"] is None:
        assert card["solved_at"] == (None if threshold is None else float(threshold))
    seconds = getattr(inner, "tau", None) or getattr(inner, "dt", None)
    rate = 1 / seconds if seconds else inner.metadata.get("render_fps", card["control_rate_hz"])
    assert card["control_rate_hz"] == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("name", ["CartPoleNoVelocity-v1", "PixelCatch-v1"])
def test_custom_environment_keeps_the_contract(name: str) -> None:
    check_env(make(CARDS[name]).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", ["CartPoleNoVelocity-v1", "PixelCatch-v1"])
def test_custom_environment_is_decided_by_its_seed(name: str) -> None:
    def episode(seed: int) -> list[np.ndarray]:
        env = make(CARDS[name])
        frames = [env.reset(seed=seed)[0]]
        for step in range(40):
            observation, reward, terminated, _, _ = env.step(step % env.action_space.n)
            frames += [observation, np.array([reward])]
            if terminated:
                break
        return frames

    first, again, other = episode(1), episode(1), episode(2)
    assert len(first) == len(again)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=False))


def test_cartpole_without_velocities_is_cartpole() -> None:
    partial, full = make(CARDS["CartPoleNoVelocity-v1"]), gym.make("CartPole-v1")
    seen, whole = partial.reset(seed=7)[0], full.reset(seed=7)[0]
    for step in range(30):
        np.testing.assert_array_equal(seen, whole[[0, 2]])
        seen, reward, terminated, *_ = partial.step(step % 2)
        whole, expected, over, *_ = full.step(step % 2)
        assert (reward, terminated) == (expected, over)


def pixel_return(choose, seed: int) -> float:
    env = make(CARDS["PixelCatch-v1"])
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        observation, reward, over, _, _ = env.step(choose(observation))
        total += reward
    return total


def chase_lowest_fruit(observation: np.ndarray) -> int:
    """A policy that reads the picture alone: move the paddle under the lowest bright thing."""
    rows, columns = np.nonzero(observation[:, :, 0] == 255)
    paddle = np.flatnonzero(observation[-1, :, 0]).mean()
    if len(rows) == 0:
        return 1
    offset = columns[rows >= rows.max() - 2].mean() - paddle
    return 1 if abs(offset) < 2 else (2 if offset > 0 else 0)


def test_pixel_catch_return_is_graded_and_reachable_from_one_frame() -> None:
    stay = [pixel_return(lambda _: 1, seed) for seed in range(20)]
    chase = [pixel_return(chase_lowest_fruit, seed) for seed in range(20)]
    assert len(set(stay)) > 3
    assert max(stay) < 15
    assert np.mean(chase) > 14
    assert max(chase) <= 20
