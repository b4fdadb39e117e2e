"""What determines a run of PPO on language."""

from __future__ import annotations

from dataclasses import dataclass

from rlquant.errors import InputError, unknown_name
from rlquant.llm.losses import KL_ESTIMATORS

__all__ = ["PPOSettings"]


@dataclass(frozen=True)
class PPOSettings:
    """What determines a run.

    Attributes:
        steps: rollouts, each with its epochs.
        batch: prompts of a rollout.
        minibatch: completions of a step of the optimizer.
        microbatch: completions that go through the model together; None takes a minibatch. Changes memory and speed,
            not the gradients.
        epochs: times that each completion is learnt from.
        learning_rate, critic_learning_rate: of Adam, for the policy's adapter and for the critic's with its head.
        anneal: let both fall linearly to zero over the steps.
        max_new_tokens: of a completion.
        temperature: of sampling.
        kl_coefficient: beta of the penalty, at first; kl_target: nats of a completion that it is steered to, None keeps
            it; kl_gain: how fast; kl_estimator: k1, k2 or k3, of the penalty.
        gamma, gae_lambda: of GAE.
        clip, value_clip: of the ratio, and of the change of a value.
        whiten_rewards, whiten_advantages: see :mod:`rlquant.llm.ppo`.
        missing_eos_penalty: taken off the score of a completion that never ended; None takes nothing.
        max_grad_norm: to which the gradients of policy and critic are clipped, each.
        seed: of everything random.
    """

    steps: int = 100
    batch: int = 16
    minibatch: int = 8
    microbatch: int | None = None
    epochs: int = 4
    learning_rate: float = 1e-5
    critic_learning_rate: float = 5e-5
    anneal: bool = False
    max_new_tokens: int = 64
    temperature: float = 1.0
    kl_coefficient: float = 0.05
    kl_target: float | None = None
    kl_gain: float = 0.1
    kl_estimator: str = "k1"
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "minibatch", "epochs", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.microbatch is not None and self.microbatch < 1:
            raise InputError(f"microbatch must be at least 1, not {self.microbatch}")
        if self.batch % self.minibatch:
            raise InputError(f"a batch of {self.batch} does not divide into minibatches of {self.minibatch}")
        for name in ("temperature", "clip", "value_clip", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise unknown_name("KL estimator", self.kl_estimator, KL_ESTIMATORS)
