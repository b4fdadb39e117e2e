"""Stock SB3 models of every kind, freshly initialised: what matters is that they are SB3's own networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3 as sb3
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import nn


class Dummy(gym.Env):
    """Random observations and zero rewards, ten steps: only the spaces matter."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, observation: str = "vector", action: str = "box") -> None:
        self.observation_space = OBSERVATIONS[observation]
        self.action_space = ACTIONS[action]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self._steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return self.observation_space.sample(), float(np.sum(action)), False, self._steps >= 10, {}

    def action_masks(self) -> np.ndarray:
        """Forbid the choice that the step count names."""
        masks = np.ones(3, bool)
        masks[self._steps % 3] = False
        return masks


IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-2.0, 2.0, (5,)),
    "image": IMAGE,
    "image_first": spaces.Box(0, 255, (1, 40, 44), np.uint8),
    "discrete": spaces.Discrete(6),
    "multidiscrete": spaces.MultiDiscrete([3, 4]),
    "multibinary": spaces.MultiBinary(4),
    "dict": spaces.Dict({"vector": spaces.Box(-1.0, 1.0, (4,)), "camera": IMAGE, "gear": spaces.Discrete(3)}),
}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(np.array([-1.0, -3.0], np.float32), np.array([1.0, 5.0], np.float32)),
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(3),
}
for _observation in OBSERVATIONS:
    for _action in ACTIONS:
        gym.register(
            f"Dummy-{_observation}-{_action}-v0",
            lambda observation=_observation, action=_action: Dummy(observation, action),
        )


def env_id(observation: str, action: str) -> str:
    """The registered id of a dummy environment."""
    return f"Dummy-{observation}-{action}-v0"


def vec_env(observation: str, action: str, *, stack: int = 1, normalise: bool = False) -> Any:
    """The chain of vector environments that a training script would build."""
    venv: Any = DummyVecEnv([lambda: gym.make(env_id(observation, action))])
    if normalise:
        venv = VecNormalize(venv)
        rng = np.random.default_rng(0)
        venv.obs_rms.mean = rng.normal(size=venv.obs_rms.mean.shape)
        venv.obs_rms.var = rng.uniform(0.1, 4.0, size=venv.obs_rms.var.shape)
        venv.training = False
    return VecFrameStack(venv, stack) if stack > 1 else venv


def _off_policy(cls: Any, policy: str, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda env: cls(policy, env, buffer_size=64, seed=1, device="cpu", **kwargs)


def _on_policy(cls: Any, policy: str, **kwargs: Any) -> Callable[[Any], Any]:
    more = {} if cls is sb3.A2C else {"batch_size": 8}
    return lambda env: cls(policy, env, n_steps=8, seed=1, device="cpu", **more, **kwargs)


# name: (observation, action, what builds the model)
MODELS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "a2c": ("vector", "box", _on_policy(sb3.A2C, "MlpPolicy")),
    "ppo": ("vector", "discrete", _on_policy(sb3.PPO, "MlpPolicy")),
    "ppo-elu": (
        "vector",
        "box",
        _on_policy(sb3.PPO, "MlpPolicy", policy_kwargs={"activation_fn": nn.ELU, "net_arch": [16, 16, 8]}),
    ),
    "ppo-sde-squashed": (
        "vector",
        "box",
        _on_policy(sb3.PPO, "MlpPolicy", use_sde=True, policy_kwargs={"squash_output": True}),
    ),
    "ppo-multidiscrete": ("vector", "multidiscrete", _on_policy(sb3.PPO, "MlpPolicy")),
    "ppo-multibinary": ("vector", "multibinary", _on_policy(sb3.PPO, "MlpPolicy")),
    "ppo-cnn": ("image", "discrete", _on_policy(sb3.PPO, "CnnPolicy")),
    "ppo-cnn-first": ("image_first", "discrete", _on_policy(sb3.PPO, "CnnPolicy")),
    "ppo-dict": ("dict", "discrete", _on_policy(sb3.PPO, "MultiInputPolicy")),
    "ppo-own-extractors": (
        "image",
        "box",
        _on_policy(sb3.PPO, "CnnPolicy", policy_kwargs={"share_features_extractor": False}),
    ),
    "ppo-discrete-observation": ("discrete", "discrete", _on_policy(sb3.PPO, "MlpPolicy")),
    "ppo-multidiscrete-observation": ("multidiscrete", "discrete", _on_policy(sb3.PPO, "MlpPolicy")),
    "ppo-multibinary-observation": ("multibinary", "discrete", _on_policy(sb3.PPO, "MlpPolicy")),
    "dqn": ("vector", "discrete", _off_policy(sb3.DQN, "MlpPolicy")),
    "dqn-cnn": ("image", "discrete", _off_policy(sb3.DQN, "CnnPolicy")),
    "ddpg": ("vector", "box", _off_policy(sb3.DDPG, "MlpPolicy", policy_kwargs={"net_arch": [24, 16]})),
    "td3": ("vector", "box", _off_policy(sb3.TD3, "MlpPolicy", policy_kwargs={"net_arch": [24, 16]})),
    "td3-dict": ("dict", "box", _off_policy(sb3.TD3, "MultiInputPolicy", policy_kwargs={"net_arch": [8]})),
    "sac": ("vector", "box", _off_policy(sb3.SAC, "MlpPolicy")),
    "sac-sde": ("vector", "box", _off_policy(sb3.SAC, "MlpPolicy", use_sde=True)),
    "tqc": ("vector", "box", _off_policy(sb3_contrib.TQC, "MlpPolicy")),
    "qrdqn": (
        "vector",
        "discrete",
        _off_policy(sb3_contrib.QRDQN, "MlpPolicy", policy_kwargs={"n_quantiles": 7}),
    ),
    "trpo": ("vector", "box", _on_policy(sb3_contrib.TRPO, "MlpPolicy")),
    "ars": ("vector", "box", lambda env: sb3_contrib.ARS("MlpPolicy", env, seed=1, device="cpu")),
    "ars-linear": ("vector", "box", lambda env: sb3_contrib.ARS("LinearPolicy", env, seed=1, device="cpu")),
    "ars-discrete": (
        "vector",
        "discrete",
        lambda env: sb3_contrib.ARS("MlpPolicy", env, seed=1, device="cpu"),
    ),
    "recurrent": ("vector", "box", _on_policy(sb3_contrib.RecurrentPPO, "MlpLstmPolicy")),
    "recurrent-two-layers": (
        "vector",
        "discrete",
        _on_policy(
            sb3_contrib.RecurrentPPO,
            "MlpLstmPolicy",
            policy_kwargs={
                "n_lstm_layers": 2,
                "lstm_hidden_size": 16,
                "enable_critic_lstm": False,
                "shared_lstm": True,
            },
        ),
    ),
    "maskable": ("vector", "discrete", _on_policy(sb3_contrib.MaskablePPO, "MlpPolicy")),
}
