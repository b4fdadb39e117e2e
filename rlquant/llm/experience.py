"""What an update of PPO learns from: a rollout with log-probabilities, values, advantages and returns of its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlquant.llm.losses import gae, kl_estimate, masked_mean, penalised_rewards, truncated_weights, whiten
from rlquant.llm.ppo_settings import PPOSettings
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import Rollout

__all__ = ["Experience", "collect"]


@dataclass(frozen=True)
class Experience:
    """A rollout, and float32 ``[batch, completion]`` of its tokens; ``weights`` None where all are 1."""

    rollout: Rollout
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor | None = None


def collect(
    roles: Roles,
    rollout: Rollout,
    scores: Tensor,
    order: Tensor,
    settings: PPOSettings,
    kl_coefficient: float,
) -> tuple[Experience, dict[str, float]]:
    """Let policy, reference and critic read a rollout; under ``torch.no_grad``.

    Args:
        roles: which read.
        rollout: of the policy as it is now.
        scores: ``[batch]``.
        order: int64 ``[batch]``, in which the first epoch takes the rows. Rows go through the model in its very
            minibatches, since the last bits of a product depend on what it is computed together with.
        settings: of the run.
        kl_coefficient: beta.

    Returns:
        The experience, and metrics: ``reward`` mean score, ``kl`` nats of a completion to the reference,
        ``kl_coefficient``, ``entropy`` nats a token, ``length`` tokens, ``ended`` share of completions with eos.
        Where the rollout knows at what log-probabilities it was sampled, also the policy mismatch: ``mismatch``, the
        largest difference to those that the update starts from, ``mismatch_mean``, and ``mismatch_kl``, nats a token.
    """
    counts, last = rollout.completed, rollout.length
    log_probs, reference, values, entropy = (
        torch.zeros(counts.shape, device=counts.device) for _ in range(4)
    )
    for minibatch in torch.split(order, settings.minibatch):
        for rows in torch.split(minibatch, settings.microbatch or len(minibatch)):
            ids, mask = rollout.ids[rows], rollout.mask[rows]
            log_probs[rows], entropy[rows] = roles.log_probs(
                "policy", ids, mask, last=last, temperature=settings.temperature
            )
            reference[rows] = roles.reference(ids, mask, last=last, temperature=settings.temperature)
            values[rows] = roles.values(ids, mask, last=last)
    kl = torch.where(counts, kl_estimate(log_probs, reference, settings.kl_estimator), 0.0)
    penalty = settings.missing_eos_penalty or 0.0
    rewards = penalised_rewards(
        scores - penalty * (~rollout.ended).to(scores.dtype), kl, counts, kl_coefficient
    )
    if settings.whiten_rewards:
        rewards = whiten(rewards, counts, shift_mean=False)
    advantages, returns = gae(rewards, values, counts, gamma=settings.gamma, gae_lambda=settings.gae_lambda)
    if settings.whiten_advantages:
        advantages = whiten(advantages, counts)
    metrics = {
        "reward": float(scores.mean()),
        "kl": float(torch.where(counts, log_probs - reference, 0.0).sum(dim=1).mean()),
        "kl_coefficient": kl_coefficient,
        "entropy": float(masked_mean(entropy, counts)),
        "length": float(counts.sum(dim=1).double().mean()),
        "ended": float(rollout.ended.double().mean()),
    }
    weights = None
    if rollout.sampled is not None:
        metrics |= _mismatch(log_probs, rollout.sampled, counts)
        if settings.importance_cap is not None:
            weights = truncated_weights(log_probs, rollout.sampled, counts, settings.importance_cap)
    return Experience(rollout, log_probs, values, advantages, returns, weights), metrics


def _mismatch(log_probs: Tensor, sampled: Tensor, counts: Tensor) -> dict[str, float]:
    """How far the policy that sampled is from the one that is trained; the KL by estimator k3."""
    gap = torch.where(counts, log_probs - sampled, 0.0)
    return {
        "mismatch": float(gap.abs().max()),
        "mismatch_mean": float(masked_mean(gap.abs(), counts)),
        "mismatch_kl": float(masked_mean(kl_estimate(sampled, log_probs, "k3"), counts)),
    }
