"""Train the shipped PPO agents with the stock trainer of Stable-Baselines3.

    python agents/train_ppo.py --agent ppo-cartpole

Schulman et al., "Proximal Policy Optimization Algorithms", 2017. Learning rate and clip range fall linearly to
zero, which lets the policy settle; the best of the evaluations during training is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from common import EvaluateEvery, KeepBest, make_env, parse
from stable_baselines3 import PPO
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv


@dataclass(frozen=True)
class Config:
    """Everything that decides a training."""

    agent: str
    """name of the agent, and of its folder"""
    env: str
    """environment card"""
    total_timesteps: int
    """environment steps, all environments together"""
    policy: str = "MlpPolicy"
    """Stable-Baselines3 policy: MlpPolicy, or CnnPolicy (NatureCNN)"""
    net_arch: tuple[int, ...] = (64, 64)
    """hidden layers of actor and critic each, after the feature extractor"""
    seed: int = 1
    """seeds environments, weights and sampling"""
    n_envs: int = 8
    """environments stepped together"""
    n_steps: int = 128
    """steps per environment and rollout"""
    batch_size: int = 256
    """samples per gradient step"""
    n_epochs: int = 10
    """passes over each rollout"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """bias against variance in generalized advantage estimation"""
    learning_rate: float = 3e-4
    """at the start; falls linearly to zero"""
    clip_range: float = 0.2
    """of the probability ratio, at the start; falls linearly to zero"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    eval_every: int = 20_000
    """environment steps between evaluations"""
    eval_episodes: int = 20
    """episodes of one evaluation"""
    threads: int = 1
    """torch threads"""
    overrides: tuple[str, ...] = ()
    """fields changed on the command line"""


AGENTS = {
    config.agent: config
    for config in (
        Config("ppo-cartpole", "CartPole-v1", 400_000, learning_rate=1e-3, n_envs=8, n_steps=128, gamma=0.98),
        Config(
            "ppo-lunarlander",
            "LunarLander-v3",
            3_000_000,
            seed=2,
            n_envs=16,
            n_steps=1024,
            batch_size=128,
            n_epochs=4,
            gamma=0.999,
            gae_lambda=0.98,
            learning_rate=5e-4,
            ent_coef=0.005,
            eval_every=100_000,
            eval_episodes=50,
        ),
        Config(
            "cnn-catch",
            "PixelCatch-v1",
            1_500_000,
            policy="CnnPolicy",
            net_arch=(),
            n_envs=16,
            n_steps=128,
            batch_size=256,
            n_epochs=4,
            gamma=0.98,
            learning_rate=5e-4,
            ent_coef=0.01,
            eval_every=50_000,
        ),
    )
}


def train(config: Config, keep_best: KeepBest) -> None:
    """Train once; ``keep_best`` writes the agent as it improves."""
    torch.set_num_threads(config.threads)
    envs = DummyVecEnv([lambda: make_env(config.env)] * config.n_envs)
    names = ("seed", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef")
    model = PPO(
        config.policy,
        envs,
        learning_rate=LinearSchedule(config.learning_rate, 0.0, 1.0),
        clip_range=LinearSchedule(config.clip_range, 0.0, 1.0),
        policy_kwargs={"net_arch": list(config.net_arch)},
        device="cpu",
        **{name: asdict(config)[name] for name in names},
    )
    model.learn(config.total_timesteps, callback=EvaluateEvery(keep_best, config.eval_every))


if __name__ == "__main__":
    configuration, out = parse(AGENTS)
    train(configuration, KeepBest(configuration, out))
