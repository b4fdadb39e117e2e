"""Quantization-aware training inside Stable-Baselines3; the oracle is stock Stable-Baselines3."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from rlquant import catalog
from rlquant.control import Agent, load, load_artifact, quantize_agent, rollout, save_artifact
from rlquant.control.collect import collect
from rlquant.control.qat_sb3 import QuantizationCallback, quantized_agent
from rlquant.errors import InputError
from tests.control.sb3_models import vec_env

NET = {"net_arch": [16, 16]}
OFF_POLICY = {"buffer_size": 1000, "learning_starts": 64, "batch_size": 32, "train_freq": 8}


def _on_policy(cls: Any, action: str, policy: str = "MlpPolicy", **more: Any) -> Callable[..., Any]:
    settings = {"n_steps": 64, "seed": 0, "device": "cpu", "policy_kwargs": NET} | more
    return lambda env=None, **over: cls(
        policy, env or vec_env("vector", action), **copy.deepcopy(settings | over)
    )


def _off_policy(cls: Any, action: str, policy: str = "MlpPolicy", **more: Any) -> Callable[..., Any]:
    settings = OFF_POLICY | {"seed": 0, "device": "cpu", "policy_kwargs": NET} | more
    return lambda env=None, **over: cls(
        policy, env or vec_env("vector", action), **copy.deepcopy(settings | over)
    )


MAKE: dict[str, Callable[..., Any]] = {
    "A2C": _on_policy(sb3.A2C, "box"),
    "PPO": _on_policy(sb3.PPO, "discrete", batch_size=32, n_epochs=2),
    "DQN": _off_policy(sb3.DQN, "discrete", target_update_interval=16, tau=0.5),
    "SAC": _off_policy(sb3.SAC, "box"),
    "TD3": _off_policy(sb3.TD3, "box"),
    "DDPG": _off_policy(sb3.DDPG, "box"),
    "TQC": _off_policy(sb3_contrib.TQC, "box"),
}
ACTING = {  # where each keeps the layers that act, and those of the target that follows
    "A2C": ("mlp_extractor.policy_net", "action_net"),
    "PPO": ("mlp_extractor.policy_net", "action_net"),
    "DQN": ("q_net", "q_net_target"),
    "SAC": ("actor.latent_pi", "actor.mu"),
    "TD3": ("actor", "actor_target"),
    "DDPG": ("actor", "actor_target"),
    "TQC": ("actor.latent_pi", "actor.mu"),
}
TARGETS = {
    "DQN": ("q_net", "q_net_target"),
    "TD3": ("actor", "actor_target"),
    "DDPG": ("actor", "actor_target"),
}


def _observations(model: Any, count: int = 200) -> np.ndarray:
    model.observation_space.seed(7)
    return np.stack([model.observation_space.sample() for _ in range(count)])


def _same_actions(ours: np.ndarray, stock: np.ndarray) -> None:
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-6)  # torch's tanh and NumPy's differ by an ulp


def _scales(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.named_parameters() if k.endswith("log_scale")}


@pytest.mark.parametrize("name", MAKE)
def test_the_acting_policy_trains_quantized_and_is_what_is_deployed(name: str, tmp_path: Path) -> None:
    model = MAKE[name]()
    model.learn(320, callback=QuantizationCallback("w3a8"))
    start = _scales(model.policy)
    model.learn(128, callback=QuantizationCallback("w3a8"))

    levels = [
        len(row.unique())
        for part in ACTING[name]
        for layer in model.policy.get_submodule(part).modules()
        if type(layer).__name__ == "QuantLinear"
        for row in layer.weight
    ]
    assert len(levels) > 16
    assert max(levels) <= 7  # -3 .. 3
    own = {k: v for k, v in start.items() if "target" not in k}
    trained = _scales(model.policy)
    assert sum(not torch.equal(trained[k], v) for k, v in own.items()) >= len(own) - 1

    agent, seen = quantized_agent(model), _observations(model)
    acted = model.predict(seen, deterministic=True)[0]
    _same_actions(agent.predict(seen)[0], acted)
    assert (agent.precision, agent.method) == ("w3a8", "qat")
    save_artifact(agent, tmp_path / "artifact")
    np.testing.assert_array_equal(
        load_artifact(tmp_path / "artifact").predict(seen)[0], agent.predict(seen)[0]
    )

    model.save(tmp_path / "model.zip")
    restored = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    np.testing.assert_array_equal(restored.predict(seen, deterministic=True)[0], acted)
    _same_actions(quantized_agent(restored).predict(seen)[0], acted)


@pytest.mark.parametrize("name", ["PPO", "DQN", "SAC"])
def test_training_goes_on_after_loading_as_if_it_had_not_stopped(name: str, tmp_path: Path) -> None:
    model = MAKE[name]()
    model.learn(320, callback=QuantizationCallback("w4a8"))
    model.save(tmp_path / "model.zip")
    restored = type(model).load(tmp_path / "model.zip", device="cpu")
    if name != "PPO":
        model.save_replay_buffer(tmp_path / "replay.pkl")
        restored.load_replay_buffer(tmp_path / "replay.pkl")
    before, runs = _scales(model.policy), []
    for each in (model, restored):
        each.set_env(MAKE[name]().get_env())
        each.set_random_seed(3)
        each.learn(128, callback=QuantizationCallback("w4a8"))
        runs.append(each.policy.state_dict())
    assert any(not torch.equal(runs[0][k], v) for k, v in before.items())
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items() if isinstance(v, Tensor))


@pytest.mark.parametrize("name", MAKE)
def test_a_delay_beyond_the_end_changes_nothing(name: str) -> None:
    stock = MAKE[name]().learn(256)
    delayed = MAKE[name]().learn(256, callback=QuantizationCallback("w4a8", delay=10_000))
    expected, found = stock.policy.state_dict(), delayed.policy.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    with pytest.raises(InputError, match="is not quantized"):
        quantized_agent(delayed)


class _BeforeTheSwap(BaseCallback):
    """Keeps the last state of the float policy."""

    def _on_rollout_start(self) -> None:
        if isinstance(self.model.policy_class, type):
            self.state = {k: v.clone() for k, v in self.model.policy.state_dict().items()}
            self.steps = self.num_timesteps

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("name", ["A2C", "PPO", "SAC", "TD3"])
def test_until_the_delay_ends_the_training_is_that_of_stock_sb3(name: str) -> None:
    before = _BeforeTheSwap()
    model = MAKE[name]()
    model.learn(512, callback=CallbackList([before, QuantizationCallback("w4a8", delay=384)]))
    assert not isinstance(model.policy_class, type)
    stock = MAKE[name]()
    stock.learn(before.steps)
    expected = stock.policy.state_dict()
    assert before.steps >= 384
    assert all(torch.equal(before.state[k], expected[k]) for k in expected)


class _RolloutsAreQuantized(BaseCallback):
    """In every rollout the actions taken are those of the agent that would be deployed at its start."""

    checked = 0

    def _on_rollout_start(self) -> None:
        self.agent = None if isinstance(self.model.policy_class, type) else quantized_agent(self.model)

    def _on_step(self) -> bool:
        if self.agent is not None:
            np.testing.assert_array_equal(self.locals["actions"], self.agent.predict(self.model._last_obs)[0])
            self.checked += 1
        return True


def test_rollouts_act_quantized() -> None:
    model = MAKE["DQN"](exploration_initial_eps=0.0, exploration_final_eps=0.0)
    check = _RolloutsAreQuantized()
    model.learn(400, callback=[QuantizationCallback("w2a4"), check])
    assert check.checked >= 100


class _LossSeesWhatActed(BaseCallback):
    """At the end of a rollout the policy gives its actions the log probabilities that the rollout stored."""

    checked = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.model.rollout_buffer
        with torch.no_grad():
            seen = torch.as_tensor(buffer.observations[:, 0])
            taken = torch.as_tensor(buffer.actions[:, 0, 0])
            _, log_probs, _ = self.model.policy.evaluate_actions(seen, taken)
        np.testing.assert_allclose(log_probs.numpy(), buffer.log_probs[:, 0], atol=1e-5)
        self.checked += not isinstance(self.model.policy_class, type)


def test_the_loss_of_ppo_sees_the_policy_that_acted() -> None:
    check = _LossSeesWhatActed()
    MAKE["PPO"](learning_rate=1e-2).learn(512, callback=[QuantizationCallback("w2a4"), check])
    assert check.checked >= 3


class _TargetsFollow(BaseCallback):
    """With ``tau=1`` what acts and its target are equal whenever a rollout ends."""

    checked = 0

    def __init__(self, online: str, target: str) -> None:
        super().__init__()
        self.names = (online, target)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        first, second = (
            dict(self.model.policy.get_submodule(name).named_parameters()) for name in self.names
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(parameter, second[name]) for name, parameter in first.items())
        self.checked += any(name.endswith("log_scale") for name in first)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_follow_what_acts(name: str) -> None:
    check = _TargetsFollow(*TARGETS[name])
    model = MAKE[name](tau=1.0, **({"target_update_interval": 1} if name == "DQN" else {}))
    model.learn(480, callback=[QuantizationCallback("w4a8"), check])
    assert check.checked >= 20


class Growing(gym.Env):
    """Observations that spread further with every episode, as those of a policy that learns to go places."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)
    spread = 1.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.spread *= 1.3
        self.steps = 0
        return self._look(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._look(), 1.0, False, self.steps >= 100, {}

    def _look(self) -> np.ndarray:
        return (self.spread * (0.5 + self.np_random.normal(size=3))).astype(np.float32)


@pytest.mark.parametrize("name", ["PPO", "DQN"])
def test_the_observation_map_follows_and_changes_no_output(name: str) -> None:
    linear = {"net_arch": []}  # hidden ranges are learned, and nothing learns here
    model = MAKE[name](DummyVecEnv([Growing]), learning_rate=0.0, policy_kwargs=linear)
    stock = copy.deepcopy(model.policy)
    model.learn(1500, callback=QuantizationCallback("w16a16"))
    seen = torch.as_tensor(np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32) * 8)

    def outputs(policy: Any) -> Tensor:
        with torch.no_grad():
            return policy.q_net(seen) if name == "DQN" else policy.get_distribution(seen).distribution.logits

    expected = outputs(stock)
    torch.testing.assert_close(outputs(model.policy), expected, rtol=0, atol=0.01 * float(expected.std()))


def test_frozen_grids_stay_while_weights_learn(tmp_path: Path) -> None:
    model = MAKE["PPO"]()
    model.learn(512, callback=QuantizationCallback("w4a8", freeze_after=64))
    assert model.policy_class.frozen

    def step(trained: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return _scales(trained.policy), {
            k: v.detach().clone() for k, v in trained.policy.named_parameters() if k.endswith(".weight")
        }

    model.save(tmp_path / "model.zip")
    for trained in (model, sb3.PPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")):
        scales, weights = step(trained)
        trained.learn(128, callback=QuantizationCallback("w4a8"))
        later, moved = step(trained)
        assert all(torch.equal(v, later[k]) for k, v in scales.items())
        assert all(not torch.equal(v, moved[k]) for k, v in weights.items())


WITH_MORE: dict[str, tuple[str, str, dict[str, Any], Callable[..., Any]]] = {
    "normalised observations, off-policy": ("vector", "box", {"normalise": True}, MAKE["SAC"]),
    "normalised observations, on-policy": ("vector", "discrete", {"normalise": True}, MAKE["PPO"]),
    "gSDE, off-policy": ("vector", "box", {}, _off_policy(sb3.SAC, "box", use_sde=True)),
    "gSDE, on-policy": ("vector", "box", {}, _on_policy(sb3.A2C, "box", use_sde=True)),
    "categories observed": ("discrete", "discrete", {}, MAKE["DQN"]),
    "several choices": ("vector", "multidiscrete", {}, MAKE["PPO"]),
    "no hidden layer": ("vector", "discrete", {}, _on_policy(sb3.PPO, "", policy_kwargs={"net_arch": []})),
    "images, shared": (
        "image_first",
        "discrete",
        {},
        _on_policy(sb3.PPO, "", "CnnPolicy", n_epochs=1, n_steps=128, policy_kwargs={}),
    ),
    "images and their target": (
        "image_first",
        "discrete",
        {},
        _off_policy(sb3.DQN, "", "CnnPolicy", train_freq=64, batch_size=8, policy_kwargs={}),
    ),
}


@pytest.mark.parametrize("case", WITH_MORE)
def test_other_observations_and_policies(case: str, tmp_path: Path) -> None:
    observation, action, chain, make = WITH_MORE[case]
    model = make(vec_env(observation, action, **chain))
    model.learn(384, callback=QuantizationCallback("w4a8"))
    shown = _observations(model, 20)
    normalise = model.get_vec_normalize_env()
    seen = shown if normalise is None else normalise.normalize_obs(shown).astype(np.float32)
    acted = model.predict(seen, deterministic=True)[0]
    _same_actions(quantized_agent(model).predict(shown)[0], acted)
    model.save(tmp_path / "model.zip")
    restored = type(model).load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    np.testing.assert_array_equal(restored.predict(seen, deterministic=True)[0], acted)


@pytest.mark.parametrize("scheme", ["int4", "w4a8-dynamic", "w4a8-g8-asym", "w4a8+trunk.0=w8a8"])
def test_schemes(scheme: str) -> None:
    model = MAKE["SAC"]()
    model.learn(320, callback=QuantizationCallback(scheme))
    seen = _observations(model)
    agent = quantized_agent(model)
    assert agent.precision == scheme
    _same_actions(agent.predict(seen)[0], model.predict(seen, deterministic=True)[0])


def test_what_cannot_be_trained_quantized_is_refused_before_anything_happens() -> None:
    refused: list[tuple[Any, str, str]] = [
        (
            sb3_contrib.QRDQN("MlpPolicy", vec_env("vector", "discrete")),
            "w4a8",
            "QRDQN cannot be trained.*PPO",
        ),
        (sb3.PPO("MultiInputPolicy", vec_env("dict", "box")), "w4a8", "not CombinedExtractor"),
        (MAKE["PPO"](), "fp8_e4m3", "learns integer grids.*take int8"),
        (MAKE["PPO"](), "w4a8+trunk.9=w8a8", "trunk.9"),
        (MAKE["SAC"](buffer_size=100), "w4a8", "replay buffer of 100 .* too small"),
    ]
    for model, scheme, message in refused:
        before = {k: v.clone() for k, v in model.policy.state_dict().items()}
        with pytest.raises(InputError, match=message):
            model.learn(512, callback=QuantizationCallback(scheme))
        assert all(torch.equal(v, before[k]) for k, v in model.policy.state_dict().items())
    with pytest.raises(InputError, match="0 or more"):
        QuantizationCallback("w4a8", delay=-1)
    with pytest.raises(InputError, match="w4a88"):
        QuantizationCallback("w4a88")
    with pytest.raises(InputError, match="observer"):
        QuantizationCallback("w4a8", observer="best")


def test_a_quantized_model_keeps_its_scheme() -> None:
    model = MAKE["PPO"]()
    model.learn(384, callback=QuantizationCallback("w4a8"))
    with pytest.raises(InputError, match="trains at w4a8 already; it cannot go on at int8"):
        model.learn(64, callback=QuantizationCallback("int8"))


def _shipped(name: str, model: Any) -> Any:
    """The model with the actor of a shipped agent; shipped files have no critic."""
    loaded = type(model).load(catalog.agent_folder(name) / "agent.zip", device="cpu")
    actor = {k: v for k, v in loaded.policy.state_dict().items() if "value" not in k}
    assert not model.policy.load_state_dict(actor, strict=False).unexpected_keys
    return model


def _score(agent: Agent) -> float:
    return float(rollout(agent, range(10), seed=0).returns.mean())


def test_fine_tuning_a_trained_policy_keeps_at_2_bits_what_rounding_loses() -> None:
    agent = load("ppo-cartpole")
    rounded = quantize_agent(agent, "w2a4", inputs=collect(agent, 4, seed=500_000))
    env = make_vec_env("CartPole-v1", 8, seed=0)
    fresh = sb3.PPO("MlpPolicy", env, n_steps=64, n_epochs=4, gamma=0.98, seed=0, device="cpu")
    model = _shipped("ppo-cartpole", fresh)
    model.learn(2048, callback=QuantizationCallback("w2a4"))
    assert _score(rounded) < 150
    assert _score(quantized_agent(model)) > 400


@pytest.mark.slow
def test_fine_tuning_wins_back_what_rounding_lost() -> None:
    agent = load("dqn-cartpole")
    rounded = quantize_agent(agent, "w4a8", inputs=collect(agent, 4, seed=500_000))
    model = sb3.DQN.load(
        catalog.agent_folder("dqn-cartpole") / "agent.zip",
        env=make_vec_env("CartPole-v1", 1, seed=0),
        device="cpu",
        seed=0,
        buffer_size=20_000,
        learning_starts=500,
        learning_rate=5e-4,
        exploration_initial_eps=0.04,
        train_freq=16,
        gradient_steps=8,
        target_update_interval=100,
    )
    model.learn(6000, callback=QuantizationCallback("w4a8"))
    assert _score(rounded) < 50
    assert _score(quantized_agent(model)) > 200
