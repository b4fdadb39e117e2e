"""A slim zip acts exactly like the model it came from, and stock Stable-Baselines3 loads it."""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, TQC, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule

from rlquant.control.slim import save_actor
from rlquant.errors import InputError


def small() -> dict:
    """Stable-Baselines3 adds keys to the dict that it is given: each model needs its own."""
    return {"net_arch": [16, 16]}


class Pictures(gym.Env):
    """Random 36 x 36 images: enough to build and train a convolutional policy."""

    observation_space = gym.spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (36, 36, 1), np.uint8), {}

    def step(self, action):
        return self.np_random.integers(0, 256, (36, 36, 1), np.uint8), float(action), False, False, {}


class Mixed(gym.Env):
    """Observations in a dict."""

    observation_space = gym.spaces.Dict(
        {"a": gym.spaces.Box(-1, 1, (3,), np.float32), "b": gym.spaces.Box(-1, 1, (2,), np.float32)}
    )
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"a": np.zeros(3, np.float32), "b": np.ones(2, np.float32)}, {}

    def step(self, action):
        a = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        b = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"a": a, "b": b}, -float(np.square(action).sum()), False, self.np_random.random() < 0.1, {}


def off_policy(kind: type[BaseAlgorithm], policy: str, env: gym.Env, **kwargs) -> BaseAlgorithm:
    return kind(
        policy, env, buffer_size=5000, learning_starts=20, batch_size=16, seed=0, device="cpu", **kwargs
    )


def on_policy(kind: type[BaseAlgorithm], policy: str, env: gym.Env, **kwargs) -> BaseAlgorithm:
    return kind(policy, env, n_steps=32, seed=0, device="cpu", **kwargs)


pendulum, cartpole = (lambda: gym.make("Pendulum-v1")), (lambda: gym.make("CartPole-v1"))
MODELS = {
    "ppo": lambda: on_policy(PPO, "MlpPolicy", cartpole(), batch_size=32, policy_kwargs=small()),
    "ppo-default": lambda: on_policy(PPO, "MlpPolicy", pendulum(), batch_size=32),
    "ppo-schedule": lambda: on_policy(
        PPO,
        "MlpPolicy",
        pendulum(),
        batch_size=32,
        learning_rate=lambda progress: 3e-4 * progress,
        clip_range=LinearSchedule(0.2, 0.1, 1.0),
        use_sde=True,
        policy_kwargs={"net_arch": {"pi": [8], "vf": [32, 32]}, "activation_fn": torch.nn.ELU},
    ),
    "ppo-cnn": lambda: on_policy(PPO, "CnnPolicy", Pictures(), batch_size=32),
    "ppo-cnn-unshared": lambda: on_policy(
        PPO, "CnnPolicy", Pictures(), batch_size=32, policy_kwargs={"share_features_extractor": False}
    ),
    "a2c-dict": lambda: on_policy(A2C, "MultiInputPolicy", Mixed()),
    "dqn": lambda: off_policy(DQN, "MlpPolicy", cartpole(), policy_kwargs=small()),
    "dqn-cnn": lambda: off_policy(DQN, "CnnPolicy", Pictures()),
    "qrdqn": lambda: off_policy(QRDQN, "MlpPolicy", cartpole(), policy_kwargs=small()),
    "sac": lambda: off_policy(SAC, "MlpPolicy", pendulum(), policy_kwargs=small()),
    "sac-fixed": lambda: off_policy(
        SAC, "MlpPolicy", pendulum(), ent_coef=0.1, policy_kwargs={"n_critics": 3}
    ),
    "sac-dict": lambda: off_policy(SAC, "MultiInputPolicy", Mixed(), policy_kwargs=small()),
    "td3": lambda: off_policy(TD3, "MlpPolicy", pendulum(), policy_kwargs=small()),
    "ddpg": lambda: off_policy(
        DDPG, "MlpPolicy", pendulum(), policy_kwargs={"net_arch": {"pi": [8], "qf": [32]}}
    ),
    "tqc": lambda: off_policy(TQC, "MlpPolicy", pendulum(), policy_kwargs=small()),
    "recurrent": lambda: on_policy(
        RecurrentPPO, "MlpLstmPolicy", cartpole(), batch_size=32, policy_kwargs={"lstm_hidden_size": 16}
    ),
    "recurrent-shared": lambda: on_policy(
        RecurrentPPO,
        "MlpLstmPolicy",
        cartpole(),
        batch_size=32,
        policy_kwargs={"lstm_hidden_size": 16, "shared_lstm": True, "enable_critic_lstm": False},
    ),
}


def observe(space: gym.Space, seed: int):
    """A sample, kept to moderate values where the space allows floats up to the largest."""
    space.seed(seed)
    sample = space.sample()
    return (
        sample if isinstance(space, gym.spaces.Dict) or sample.dtype == np.uint8 else np.clip(sample, -3, 3)
    )


def actions(model: BaseAlgorithm, observations: list) -> np.ndarray:
    """Deterministic actions along a sequence, the recurrent state carried."""
    state, taken = None, []
    for step, observation in enumerate(observations):
        action, state = model.predict(
            observation, state=state, episode_start=np.array([step == 0]), deterministic=True
        )
        taken.append(action)
    return np.stack(taken)


@pytest.mark.parametrize("name", MODELS)
def test_slim_acts_bit_for_bit_like_the_trained_model(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.learn(32)
    untrained = {key: value.clone() for key, value in model.policy.state_dict().items()}
    path = save_actor(model, tmp_path / "agent.zip")
    slim = type(model).load(path, device="cpu")
    observations = [observe(model.observation_space, seed) for seed in range(20)]
    np.testing.assert_array_equal(actions(slim, observations), actions(model, observations))
    # The model itself is left as it was.
    assert all(torch.equal(value, untrained[key]) for key, value in model.policy.state_dict().items())
    model.save(tmp_path / "whole.zip")
    assert path.stat().st_size < (tmp_path / "whole.zip").stat().st_size
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".tmp"] == []


@pytest.mark.parametrize("name", ["ppo-schedule", "dqn", "recurrent", "tqc"])
def test_the_same_model_gives_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]()
    first = save_actor(model, tmp_path / "first.zip").read_bytes()
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(1e9))  # zipfile's clock
    torch.manual_seed(123)
    assert save_actor(model, tmp_path / "second.zip").read_bytes() == first


def test_slim_of_slim_acts_alike(tmp_path: Path) -> None:
    model = MODELS["sac"]()
    first = SAC.load(save_actor(model, tmp_path / "first.zip"), device="cpu")
    second = SAC.load(save_actor(first, tmp_path / "second.zip"), device="cpu")
    observations = [observe(model.observation_space, seed) for seed in range(20)]
    np.testing.assert_array_equal(actions(second, observations), actions(model, observations))


def test_size_is_that_of_the_actor(tmp_path: Path) -> None:
    """SAC on 17 observations and 6 actions with 256-256: 73,484 fp32 numbers of actor, at most 10% around them."""
    env = gym.make("Pendulum-v1")
    env = gym.wrappers.TransformObservation(
        env, lambda o: np.zeros(17, np.float32), gym.spaces.Box(-1, 1, (17,))
    )
    model = SAC("MlpPolicy", env, buffer_size=10, policy_kwargs={"net_arch": [256, 256]}, device="cpu")
    actor = 4 * sum(parameter.numel() for parameter in model.actor.parameters())
    assert save_actor(model, tmp_path / "agent.zip").stat().st_size < 1.1 * actor


def test_no_pickled_code_and_no_machine_in_the_zip(tmp_path: Path) -> None:
    path = save_actor(MODELS["ppo-schedule"](), tmp_path / "agent.zip")
    with zipfile.ZipFile(path) as archive:
        assert "system_info.txt" not in archive.namelist()
        data = archive.read("data").decode()
    assert "<lambda>" not in data
    assert "CodeType" not in data
    assert "FloatSchedule" not in data


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    path = save_actor(MODELS["ppo"](), tmp_path / "agent.zip")
    assert PPO.load(path, device="cpu").seed is None


def test_a_policy_that_cannot_be_rebuilt_is_refused_and_nothing_written(tmp_path: Path) -> None:
    model = MODELS["ppo"]()
    model.policy.action_net = torch.nn.Linear(16, 3)  # not what policy_kwargs say
    with pytest.raises(InputError, match=r"action_net\.weight.*model\.save"):
        save_actor(model, tmp_path / "agent.zip")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.zip"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_actor(MODELS["ppo"](), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
