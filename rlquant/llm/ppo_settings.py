"""What determines a run of PPO on language."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from rlquant.config import Section
from rlquant.llm.decode.cache import CacheScheme
from rlquant.llm.sampling import KV_CACHE, ROLLOUTS, Rollouts

__all__ = ["PPOSettings"]


class PPOSettings(Section):
    """What determines a run."""

    steps: int = Field(100, ge=1, description="rollouts, each with its epochs")
    batch: int = Field(16, ge=1, description="prompts of a rollout")
    minibatch: int = Field(8, ge=1, description="completions of a step of the optimizer; divides the batch")
    microbatch: int | None = Field(
        None,
        ge=1,
        description="completions that go through the model together: memory and speed, not gradients",
    )
    epochs: int = Field(4, ge=1, description="times that each completion is learnt from")
    learning_rate: float = Field(1e-5, description="of Adam, for the policy's adapter")
    critic_learning_rate: float = Field(5e-5, description="for the critic's adapter and its head")
    anneal: bool = Field(False, description="let both fall linearly to zero over the steps")
    max_new_tokens: int = Field(64, ge=1, description="of a completion")
    rollouts: Rollouts = Field("auto", description=ROLLOUTS)
    kv_cache: CacheScheme | None = Field(None, description=KV_CACHE)
    importance_cap: float | None = Field(
        None, gt=0, description="truncated importance weights of rlquant's rollouts; null: none"
    )
    temperature: float = Field(1.0, gt=0, description="of sampling")
    kl_coefficient: float = Field(0.05, description="beta of the penalty, at first")
    kl_target: float | None = Field(
        None, description="nats of a completion that beta is steered to; null keeps it"
    )
    kl_gain: float = Field(0.1, description="how fast it is steered")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="of the penalty")
    gamma: float = Field(1.0, ge=0, le=1, description="of GAE")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="of GAE")
    clip: float = Field(0.2, gt=0, description="of the ratio")
    value_clip: float = Field(0.2, gt=0, description="of the change of a value")
    whiten_rewards: bool = Field(False, description="see rlquant.llm.ppo")
    whiten_advantages: bool = Field(True, description="see rlquant.llm.ppo")
    missing_eos_penalty: float | None = Field(None, description="taken off the score of what never ended")
    max_grad_norm: float = Field(1.0, gt=0, description="of the gradients of policy and critic, each")
    seed: int = Field(0, description="of everything random")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.batch % self.minibatch:
            raise ValueError(f"a batch of {self.batch} does not divide into minibatches of {self.minibatch}")
        return self
