"""The environment that scores a policy: made by id, wrapped as in training, found under its present name.

Ids retire (``LunarLander-v2``); their successors often keep observation and action spaces. A retired id is
mapped to the newest registered version whose spaces fit the agent, so that old checkpoints keep running and a
changed observation is never fed to a network that was not trained on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np

from rlquant.control.env_ids import quiet, register, registered, unknown_env, versions
from rlquant.control.spaces import Space
from rlquant.control.wrappers import wrap
from rlquant.errors import InputError, missing_package

__all__ = ["EnvSpec", "make_env", "random_scores", "resolve_env"]


@dataclass(frozen=True)
class EnvSpec:
    """How to make an environment.

    Attributes:
        id: gymnasium id as registered now; ``module:Id-v0`` imports a module first.
        kwargs: for ``gym.make``.
        wrappers: (name in :data:`~rlquant.control.wrappers.WRAPPERS`, keyword arguments), applied in order.
        requested: the id that was asked for, where it is a retired one.
    """

    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[tuple[str, dict[str, Any]], ...] = ()
    requested: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as an artifact stores it."""
        return {"id": self.id, "kwargs": self.kwargs, "wrappers": [list(w) for w in self.wrappers]}

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> EnvSpec:
        """The inverse of :meth:`to_json`."""
        return cls(doc["id"], doc["kwargs"], tuple((name, kwargs) for name, kwargs in doc["wrappers"]))


def make_env(spec: EnvSpec) -> gym.Env:
    """One environment, wrapped, without gymnasium's per-step checks (they cost more than a CartPole step).

    Raises:
        InputError: the id is unknown (nearest suggested), a package is missing, or a wrapper is unknown.
    """
    register(spec.id)
    if not registered(spec.id):
        raise unknown_env(spec.id)
    try:
        with quiet(spec.id):
            env = gym.make(spec.id, disable_env_checker=True, **spec.kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise _not_installed(spec.id, error) from None
    except gym.error.Error as error:
        raise InputError(f"the environment {spec.id} cannot be made: {error}") from None
    except TypeError as error:
        raise InputError(f"the environment {spec.id} does not take {spec.kwargs}: {error}") from None
    for name, kwargs in spec.wrappers:
        env = wrap(env, name, kwargs)
    return env


def resolve_env(requested: EnvSpec, fits: Callable[[gym.Env], bool]) -> EnvSpec:
    """The registered environment for one whose id may have retired.

    Args:
        requested: as the agent's files name it, e.g. ``HalfCheetah-v3``.
        fits: whether a made environment's spaces fit the agent.

    Raises:
        InputError: no registered version fits, none can be made, or the id is unknown.
    """
    problems: list[InputError] = []
    for candidate in _candidates(requested):
        try:
            env = make_env(candidate)
        except InputError as error:
            problems.append(error)
            continue
        if fits(env):
            env.close()
            return candidate
        problems.append(InputError(f"{candidate.id} has {_describe_spaces(env)}"))
        env.close()
    if not problems:
        raise unknown_env(requested.id)
    reasons = list(dict.fromkeys(map(str, problems)))
    if not any(" has observations " in reason for reason in reasons):
        # None could even be made: what to install says more than that the old id has retired.
        raise next((problem for problem in problems if "pip install" in str(problem)), problems[0])
    raise InputError(f"no version of {requested.id} fits this agent's spaces: {'; '.join(reasons)}")


def random_scores(spec: EnvSpec, episodes: int, seed: int) -> np.ndarray:
    """Returns ``[episodes]`` of uniformly random actions, the zero of the retention scale.

    Episode ``i`` seeds both ``env.reset`` and the sampling of actions with ``seed + i``.
    """
    env = make_env(spec)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        env.action_space.seed(seed + episode)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += float(reward)
            done = terminated or truncated
    env.close()
    return returns


def _candidates(requested: EnvSpec) -> list[EnvSpec]:
    """Each version of the id, as it is and with goals flattened as SB3's first HER did."""
    found = []
    for env_id, kwargs, wrappers in versions(requested.id):
        spec = EnvSpec(
            env_id,
            {**kwargs, **requested.kwargs},
            (*requested.wrappers, *wrappers),
            requested=None if env_id == requested.id else requested.id,
        )
        found.append(spec)
        if re.match(r"Fetch|Hand|Panda|parking", env_id):
            found.append(replace(spec, wrappers=(*spec.wrappers, ("FlattenGoal", {}))))
    return found


def _describe_spaces(env: gym.Env) -> str:
    seen, taken = (Space.from_gym(space).describe() for space in (env.observation_space, env.action_space))
    return f"observations {seen} and actions {taken}"


def _not_installed(env_id: str, error: Exception) -> InputError:
    text = str(error)
    if "moved" in text:
        return InputError(f"the environment {env_id} has retired")
    if (
        re.search(r"mujoco(?!.py)", text, re.IGNORECASE)
        and "mujoco_py" not in text
        and "mujoco-py" not in text
    ):
        return missing_package("mujoco", "mujoco", f"the environment {env_id}")
    return InputError(f"the environment {env_id} cannot be made: {text}")
