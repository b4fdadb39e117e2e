"""Train the shipped recurrent agent with RecurrentPPO of sb3-contrib: PPO over an LSTM.

    python agents/train_recurrent_ppo.py --agent recurrentppo-cartpole

The LSTM's state replaces the velocities that the environment hides. Learning rate and clip range fall linearly
to zero; the best of the evaluations during training is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from common import EvaluateEvery, KeepBest, make_env, parse
from sb3_contrib import RecurrentPPO
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
    lstm_hidden_size: int = 64
    """units of the actor's LSTM, and of the critic's"""
    net_arch: tuple[int, ...] = (64,)
    """hidden layers of actor and critic each, after the LSTM"""
    seed: int = 1
    """seeds environments, weights and sampling"""
    n_envs: int = 16
    """environments stepped together"""
    n_steps: int = 64
    """steps per environment and rollout: the length over which gradients reach back"""
    batch_size: int = 256
    """samples per gradient step"""
    n_epochs: int = 5
    """passes over each rollout"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.9
    """bias against variance in generalized advantage estimation"""
    learning_rate: float = 1e-3
    """at the start; falls linearly to zero"""
    clip_range: float = 0.2
    """of the probability ratio, at the start; falls linearly to zero"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    eval_every: int = 25_000
    """environment steps between evaluations"""
    eval_episodes: int = 20
    """episodes of one evaluation"""
    threads: int = 1
    """torch threads"""
    overrides: tuple[str, ...] = ()
    """fields changed on the command line"""


AGENTS = {"recurrentppo-cartpole": Config("recurrentppo-cartpole", "CartPoleNoVelocity-v1", 400_000)}


def train(config: Config, keep_best: KeepBest) -> None:
    """Train once; ``keep_best`` writes the agent as it improves."""
    torch.set_num_threads(config.threads)
    envs = DummyVecEnv([lambda: make_env(config.env)] * config.n_envs)
    names = ("seed", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef")
    model = RecurrentPPO(
        "MlpLstmPolicy",
        envs,
        learning_rate=LinearSchedule(config.learning_rate, 0.0, 1.0),
        clip_range=LinearSchedule(config.clip_range, 0.0, 1.0),
        policy_kwargs={
            "net_arch": list(config.net_arch),
            "lstm_hidden_size": config.lstm_hidden_size,
            "ortho_init": False,
            "activation_fn": torch.nn.ReLU,
        },
        device="cpu",
        **{name: asdict(config)[name] for name in names},
    )
    model.learn(config.total_timesteps, callback=EvaluateEvery(keep_best, config.eval_every))


if __name__ == "__main__":
    configuration, out = parse(AGENTS)
    train(configuration, KeepBest(configuration, out))
