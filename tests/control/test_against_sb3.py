"""The oracle is stock SB3: its own networks, its own predict, its own vector environments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_models import MODELS, env_id, vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from rlquant import catalog
from rlquant.control import Session, from_sb3, load, make_env
from rlquant.control.agent import Agent
from rlquant.control.trusted import sb3_class


def shake(model: Any) -> None:
    """Move every weight: fresh policies choose nearly the same action everywhere."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def play_stock(model: Any, venv: Any, steps: int, *, masked: bool) -> tuple[list[Any], list[np.ndarray]]:
    """Raw observations and SB3's deterministic actions along one seeded run."""
    venv.seed(3)
    seen, actions, state = [], [], None
    observation = venv.reset()
    start = np.ones(1, bool)
    for _ in range(steps):
        raw = venv.get_original_obs() if hasattr(venv, "get_original_obs") else observation
        seen.append(raw)
        more = {"action_masks": np.array(venv.env_method("action_masks"))} if masked else {}
        action, state = model.predict(
            observation, state=state, episode_start=start, deterministic=True, **more
        )
        actions.append(action[0])
        observation, _, start, _ = venv.step(action)
    return seen, actions


def play_ours(agent: Agent, seen: list[Any], masks: list[np.ndarray] | None = None) -> list[np.ndarray]:
    session = Session(agent, rows=1, tile=1)
    starts = np.ones(1, bool)
    actions = []
    for step, observation in enumerate(seen):
        mask = None if masks is None else masks[step][None]
        actions.append(session.act(observation, starts, masks=mask)[0])
        starts = np.zeros(1, bool)
    return actions


@pytest.mark.parametrize("name", MODELS)
def test_every_algorithm_acts_as_stock_sb3(name: str, tmp_path: Path) -> None:
    observation, action, build = MODELS[name]
    venv = vec_env(observation, action)
    model = build(venv)
    shake(model)
    model.save(tmp_path / "agent.zip")
    agent = load(tmp_path / "agent.zip", env=env_id(observation, action))
    assert agent.algorithm == type(model).__name__
    masked = name == "maskable"
    seen, expected = play_stock(model, venv, 8, masked=masked)
    masks = [np.arange(3) != step % 3 for step in range(8)] if masked else None
    actions = play_ours(agent, seen, masks)
    for ours, stock in zip(actions, expected, strict=True):
        np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-5)
    live = play_ours(from_sb3(model, env=env_id(observation, action)), seen, masks)
    np.testing.assert_array_equal(live, actions)


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("name", ["ppo", "sac"])
def test_normaliser_and_frame_stack_act_as_in_training(name: str, stack: int, tmp_path: Path) -> None:
    observation, action, build = MODELS[name]
    venv = vec_env(observation, action, stack=stack, normalise=True)
    model = build(venv)
    normalise = model.get_vec_normalize_env()
    agent = from_sb3(model, env=env_id(observation, action))
    # SB3 shows normalised, stacked observations; the agent gets the raw ones.
    venv.seed(3)
    shown, start = venv.reset(), np.ones(1, bool)
    session = Session(agent, rows=1, tile=1)
    for _ in range(6):
        raw = normalise.get_original_obs()
        expected, _ = model.predict(shown, deterministic=True)
        np.testing.assert_allclose(session.act(raw, start), expected, rtol=0, atol=1e-5)
        shown, _, _, _ = venv.step(expected)
        start = np.zeros(1, bool)


@pytest.mark.parametrize("name", ["ppo-lunarlander", "recurrentppo-cartpole"])
def test_stock_evaluate_policy_takes_an_agent(name: str) -> None:
    agent = load(name)
    model = sb3_class(agent.algorithm).load(catalog.agent_folder(name) / "agent.zip", device="cpu")
    returns = []
    for policy in (agent, model):
        venv = DummyVecEnv([lambda: make_env(agent.env)] * 2)
        venv.seed(5)
        found, _ = evaluate_policy(policy, venv, n_eval_episodes=4, return_episode_rewards=True, warn=False)
        returns.append(found)
    np.testing.assert_allclose(*returns, rtol=1e-4)


def test_frame_stack_forgets_at_the_start_of_an_episode() -> None:
    observation, action, build = MODELS["ppo"]
    venv = vec_env(observation, action, stack=2)
    agent = from_sb3(build(venv), env=env_id(observation, action))
    session = Session(agent, rows=1, tile=1)
    first = np.full((1, 5), 0.5, np.float32)
    session.act(first, np.ones(1, bool))
    fresh = session.outputs.copy()
    session.act(first, np.zeros(1, bool))
    assert not np.array_equal(session.outputs, fresh)
    session.act(first, np.ones(1, bool))
    np.testing.assert_array_equal(session.outputs, fresh)
