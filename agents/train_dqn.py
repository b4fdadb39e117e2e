"""Train the shipped DQN agent with the stock trainer of Stable-Baselines3.

    python agents/train_dqn.py --agent dqn-cartpole

Mnih et al., "Human-level control through deep reinforcement learning", 2015. Rollouts of 256 steps alternate
with 128 gradient steps, as in RL Zoo; the learning rate falls linearly to zero; the best of the evaluations
during training is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from common import EvaluateEvery, KeepBest, make_env, parse
from stable_baselines3 import DQN
from stable_baselines3.common.utils import LinearSchedule


@dataclass(frozen=True)
class Config:
    """Everything that decides a training."""

    agent: str
    """name of the agent, and of its folder"""
    env: str
    """environment card"""
    total_timesteps: int
    """environment steps"""
    net_arch: tuple[int, ...] = (256, 256)
    """hidden layers of the action-value network"""
    seed: int = 1
    """seeds environment, weights and exploration"""
    learning_rate: float = 2.3e-3
    """at the start; falls linearly to zero"""
    batch_size: int = 64
    """transitions per gradient step"""
    buffer_size: int = 100_000
    """transitions kept"""
    learning_starts: int = 2_000
    """steps before the first update"""
    gamma: float = 0.99
    """discount"""
    train_freq: int = 256
    """environment steps between two rounds of updates"""
    gradient_steps: int = 128
    """gradient steps in one round"""
    target_update_interval: int = 10
    """environment steps between two copies to the target network"""
    exploration_fraction: float = 0.2
    """part of the training over which epsilon falls from 1"""
    exploration_final_eps: float = 0.04
    """epsilon from then on"""
    eval_every: int = 10_000
    """environment steps between evaluations"""
    eval_episodes: int = 20
    """episodes of one evaluation"""
    threads: int = 1
    """torch threads"""
    overrides: tuple[str, ...] = ()
    """fields changed on the command line"""


AGENTS = {"dqn-cartpole": Config("dqn-cartpole", "CartPole-v1", 100_000)}

_OURS = {
    "agent",
    "env",
    "total_timesteps",
    "net_arch",
    "learning_rate",
    "eval_every",
    "eval_episodes",
    "threads",
}


def train(config: Config, keep_best: KeepBest) -> None:
    """Train once; ``keep_best`` writes the agent as it improves."""
    torch.set_num_threads(config.threads)
    settings = {name: value for name, value in asdict(config).items() if name not in {*_OURS, "overrides"}}
    model = DQN(
        "MlpPolicy",
        make_env(config.env),
        learning_rate=LinearSchedule(config.learning_rate, 0.0, 1.0),
        policy_kwargs={"net_arch": list(config.net_arch)},
        device="cpu",
        **settings,
    )
    model.learn(config.total_timesteps, callback=EvaluateEvery(keep_best, config.eval_every))


if __name__ == "__main__":
    configuration, out = parse(AGENTS)
    train(configuration, KeepBest(configuration, out))
