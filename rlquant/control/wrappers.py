"""Wrappers that agents were trained with, by the class name that an rl-zoo ``config.yml`` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from rlquant.errors import InputError, unknown_name

__all__ = ["WRAPPERS", "FlattenGoal", "wrap"]


class FlattenGoal(gym.ObservationWrapper):
    """``concat(observation, desired_goal)``: what SB3's HER before 1.1 fed to its policies (``ObsDictWrapper``)."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        parts = [env.observation_space[key] for key in ("observation", "desired_goal")]  # type: ignore[index]
        low, high = (np.concatenate([getattr(part, bound) for part in parts]) for bound in ("low", "high"))
        self.observation_space = gym.spaces.Box(low, high, dtype=parts[0].dtype)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """``[observation + goal]``."""
        return np.concatenate([observation["observation"], observation["desired_goal"]])


class MaskFeatures(gym.ObservationWrapper):
    """Zeros in place of some features.

    Args:
        env: with a flat observation.
        features: indices of what is hidden.
    """

    def __init__(self, env: gym.Env, features: list[int]) -> None:
        super().__init__(env)
        assert env.observation_space.shape is not None
        self._shown = np.ones(env.observation_space.shape, env.observation_space.dtype)
        self._shown[features] = 0

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """The same shape."""
        return observation * self._shown


class History(gym.Wrapper):
    """The last ``horizon`` observations and actions, zeros before the episode began (rl-zoo's HistoryWrapper)."""

    def __init__(self, env: gym.Env, horizon: int = 2) -> None:
        super().__init__(env)
        seen, taken = env.observation_space, env.action_space
        assert isinstance(seen, gym.spaces.Box)
        assert isinstance(taken, gym.spaces.Box)
        low, high = (
            np.concatenate([np.tile(getattr(seen, b), horizon), np.tile(getattr(taken, b), horizon)])
            for b in ("low", "high")
        )
        self.observation_space = gym.spaces.Box(low, high, dtype=seen.dtype)
        self._observations = np.zeros(low.size - taken.shape[0] * horizon, seen.dtype)
        self._actions = np.zeros(taken.shape[0] * horizon, taken.dtype)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Forget, then show the first observation."""
        observation, info = self.env.reset(**kwargs)
        self._observations[:] = 0
        self._actions[:] = 0
        return self._push(observation, None), info

    def step(self, action: Any) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        """Step and show the history."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._push(observation, action), reward, terminated, truncated, info

    def _push(self, observation: np.ndarray, action: Any) -> np.ndarray:
        self._observations = np.roll(self._observations, -observation.size)
        self._observations[-observation.size :] = observation
        if action is not None:
            self._actions = np.roll(self._actions, -np.size(action))
            self._actions[-np.size(action) :] = action
        return np.concatenate([self._observations, self._actions])


# Indices of velocities, as rl-zoo's MaskVelocityWrapper has them.
_VELOCITIES = {
    "CartPole": [1, 3],
    "MountainCar": [1],
    "MountainCarContinuous": [1],
    "Pendulum": [2],
    "LunarLander": [2, 3, 5],
    "LunarLanderContinuous": [2, 3, 5],
}


def _mask_velocity(env: gym.Env) -> gym.Env:
    name = env.spec.name if env.spec is not None else ""
    if name not in _VELOCITIES:
        raise InputError(f"the velocities of {name} are not known; known: {', '.join(_VELOCITIES)}")
    return MaskFeatures(env, _VELOCITIES[name])


def _zero_contact_forces(env: gym.Env) -> gym.Env:
    """Ant's 84 contact forces, which mujoco-py 2 left at zero: v2 and v3 agents never saw another value."""
    return MaskFeatures(env, list(range(27, 111)))


def _time_feature(env: gym.Env, **kwargs: Any) -> gym.Env:
    from sb3_contrib.common.wrappers import TimeFeatureWrapper

    return TimeFeatureWrapper(env, **kwargs)


def _atari(env: gym.Env, **kwargs: Any) -> gym.Env:
    from stable_baselines3.common.atari_wrappers import AtariWrapper

    # A score is the game's own: whole games, unclipped points.
    return AtariWrapper(env, **{**kwargs, "terminal_on_life_loss": False, "clip_reward": False})


def _flatten(env: gym.Env) -> gym.Env:
    return gym.wrappers.FlattenObservation(env)


WRAPPERS: dict[str, Callable[..., gym.Env]] = {
    "TimeFeatureWrapper": _time_feature,
    "AtariWrapper": _atari,
    "FlattenObservation": _flatten,
    "HistoryWrapper": History,
    "MaskVelocityWrapper": _mask_velocity,
    "FlattenGoal": FlattenGoal,
    "ZeroContactForces": _zero_contact_forces,
}


def wrap(env: gym.Env, name: str, kwargs: dict[str, Any]) -> gym.Env:
    """Apply one wrapper. Raises InputError for an unknown name or arguments that it does not take."""
    if name not in WRAPPERS:
        raise unknown_name("environment wrapper", name, WRAPPERS)
    try:
        return WRAPPERS[name](env, **kwargs)
    except (TypeError, AssertionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the wrapper {name} cannot be applied with {kwargs}: {error}") from None
