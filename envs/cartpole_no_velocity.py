"""CartPole that shows positions and hides velocities: the smallest task that needs memory.

The dynamics, rewards and limits are CartPole-v1's (Barto, Sutton and Anderson, 1983). An agent sees the cart's
position and the pole's angle; without memory it cannot tell which way the pole is falling. Executing this file
registers ``CartPoleNoVelocity-v1`` with Gymnasium.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

ID = "CartPoleNoVelocity-v1"
_VISIBLE = [0, 2]  # of position, velocity, angle, angular velocity


class CartPoleNoVelocity(CartPoleEnv):
    """Observation [2] float32: cart position in m (episode ends beyond 2.4), pole angle in rad (beyond 0.2095)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        full = self.observation_space
        assert isinstance(full, gym.spaces.Box)
        self.observation_space = gym.spaces.Box(full.low[_VISIBLE], full.high[_VISIBLE], dtype=np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Start as CartPole-v1 does: each state variable uniform in [-0.05, 0.05]."""
        observation, info = super().reset(**kwargs)
        return observation[_VISIBLE], info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Push left (0) or right (1) for one step of 0.02 s; reward 1 a step."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation[_VISIBLE], float(reward), terminated, truncated, info


if ID not in gym.registry:
    gym.register(ID, entry_point=CartPoleNoVelocity, max_episode_steps=500)
