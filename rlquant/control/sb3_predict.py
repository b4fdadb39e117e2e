"""Stock Stable-Baselines3, to be timed beside our runtimes: ``model.predict(observation, deterministic=True)``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlquant import catalog
from rlquant.control.agent import Agent
from rlquant.control.environment import make_env
from rlquant.control.observation import FrameStack
from rlquant.control.trusted import sb3_model
from rlquant.control.zoo_folder import find_zoo_folder
from rlquant.errors import InputError

__all__ = ["predict_in_sb3"]


def predict_in_sb3(agent: Agent, *, trust: bool = False) -> Callable[[Any], Any]:
    """What maps one observation to SB3's action, in the middle of an episode.

    SB3 keeps normalisers and stacked frames in its vector environments; here they are applied before the
    model, as part of a call, so that all that is timed begins with what the environment shows.

    Args:
        agent: whose ``source`` is a shipped agent or an SB3 checkpoint.
        trust: let SB3 load a checkpoint that is not shipped, which runs whatever code it holds.

    Raises:
        InputError: not trusted, no SB3 checkpoint, or SB3 cannot load it.
    """
    model, _ = sb3_model(_checkpoint(agent.source, trust), **_spaces(agent))
    remembers = hasattr(model.policy, "lstm_actor")
    frames = {key: FrameStack(part, 1) for key, part in agent.parts.items() if part.stack > 1}
    prepared = frames or any(part.normaliser is not None for part in agent.parts.values())
    start, state = np.zeros(1, bool), None

    def shown(key: str, x: Any) -> Any:
        normaliser = agent.parts[key].normaliser
        x = x if normaliser is None else normaliser(x)
        return frames[key].push(x[None], start)[0] if key in frames else x

    def act(observation: Any) -> Any:
        nonlocal state
        if prepared and isinstance(observation, dict):
            observation = {key: shown(key, x) for key, x in observation.items()}
        elif prepared:
            observation = shown("", observation)
        if not remembers:
            return model.predict(observation, deterministic=True)[0]
        action, state = model.predict(observation, state=state, episode_start=start, deterministic=True)
        return action

    return act


def _spaces(agent: Agent) -> dict[str, Any]:
    """The model's spaces, where they are the environment's own."""
    if any(part.stack > 1 or part.transpose for part in agent.parts.values()):
        return {}
    env = make_env(agent.env)
    env.close()
    return {"observation_space": env.observation_space, "action_space": env.action_space}


def _checkpoint(source: str, trust: bool) -> Path:
    path = Path(source)
    if source in catalog.agents() and not path.exists():
        return catalog.agent_folder(source) / "agent.zip"
    zoo = find_zoo_folder(path)
    if zoo is None and not path.is_file():
        raise InputError(f"{source} is no SB3 checkpoint")
    if not trust:
        raise InputError(
            "SB3 unpickles a checkpoint, which runs whatever code it holds; allow that with --trust"
        )
    return zoo.checkpoint if zoo is not None else path
