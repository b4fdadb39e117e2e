"""Losses and estimators of training by reward, on tensors alone.

Rows are sequences ``[batch, tokens]``; a mask of the same shape says which tokens count. Every function keeps the
dtype of its input and is differentiable where a loss is.

- Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation: :func:`gae`
- Schulman et al. 2017, Proximal Policy Optimization Algorithms: :func:`policy_loss`
- Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences: :func:`penalised_rewards`,
  :class:`AdaptiveKL`
- Schulman 2020, Approximating KL Divergence (joschu.net/blog/kl-approx.html): :func:`kl_estimate`
- Ouyang et al. 2022, Training language models to follow instructions with human feedback: :func:`bradley_terry_loss`
- Rafailov et al. 2023, Direct Preference Optimization: :func:`dpo_loss`
- Huang et al. 2023, The N Implementation Details of RLHF with PPO: :func:`whiten`, :func:`value_loss`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rlquant.errors import InputError, unknown_name

__all__ = [
    "KL_ESTIMATORS",
    "AdaptiveKL",
    "PolicyLoss",
    "bradley_terry_loss",
    "dpo_loss",
    "gae",
    "kl_estimate",
    "masked_mean",
    "penalised_rewards",
    "policy_loss",
    "truncated_weights",
    "value_loss",
    "whiten",
]

KL_ESTIMATORS = ("k1", "k2", "k3")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values that count; ``[...]`` and a mask of that shape to a scalar, 0 where none counts."""
    weights = mask.to(values.dtype)
    # Where, not times zero: what does not count may be infinite.
    return torch.where(mask.bool(), values, 0.0).sum() / weights.sum().clamp_min(1.0)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Unit variance (of the population, not of a sample), and zero mean unless ``shift_mean`` is False; 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask.bool(), white if shift_mean else white + mean, 0.0)


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) from tokens that the policy sampled, in nats, elementwise.

    With ``r = p_reference / p_policy``: k1 is ``-log r`` (unbiased), k2 ``(log r)^2 / 2`` (biased, small variance), k3
    ``r - 1 - log r`` (unbiased, never negative).
    """
    log_ratio = reference - log_probs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise unknown_name("KL estimator", kind, KL_ESTIMATORS)


def penalised_rewards(scores: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """Reward of each token: ``-coefficient * kl``, and at the last token that counts the score of the whole.

    Args:
        scores: ``[batch]``.
        kl: estimates by token, ``[batch, tokens]``.
        mask: tokens of the completions, contiguous from the first on; none may be empty.
        coefficient: beta.
    """
    rewards = torch.where(mask.bool(), -coefficient * kl, 0.0)
    last = mask.long().sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that the critic learns, ``[batch, tokens]`` each, without gradients.

    ``A_t = sum_l (gamma lambda)^l delta_(t+l)``, ``delta_t = r_t + gamma V_(t+1) - V_t``; the state after the
    last token is terminal, of value 0. A return is ``A_t + V_t``.
    """
    rewards, values = rewards.detach(), values.detach()
    advantages = torch.zeros_like(rewards)
    zero = torch.zeros_like(rewards[:, 0])
    following, later = zero, zero
    for t in range(rewards.shape[1] - 1, -1, -1):
        counts = mask[:, t].bool()
        delta = rewards[:, t] + gamma * following - values[:, t]
        later = torch.where(counts, delta + gamma * gae_lambda * later, zero)
        following = torch.where(counts, values[:, t], zero)
        advantages[:, t] = later
    return advantages, torch.where(mask.bool(), advantages + values, 0.0)


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped loss and what it says about the step, scalars.

    Attributes:
        loss: to minimise.
        clipped: share of tokens whose ratio lies outside the clip range in the direction that the loss ignores.
        approx_kl: k3 estimate of KL(old policy || policy).
        largest: ratio that is farthest from 1, as ``max |log ratio|``.
    """

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor
    largest: Tensor


def policy_loss(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """``mean w max(-A r, -A clip(r, 1 - clip, 1 + clip))``, ``r = exp(log_probs - old)``; all ``[batch, tokens]``.

    ``weights`` are 1 unless what sampled was not quite the policy, see :func:`truncated_weights`.
    """
    log_ratio = torch.where(mask.bool(), log_probs - old, 0.0)
    ratio = log_ratio.exp()
    free, bounded = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        clipped = masked_mean((bounded > free).to(ratio.dtype), mask)
        kl = masked_mean(ratio - 1 - log_ratio, mask)
        largest = log_ratio.abs().max()
    each = torch.maximum(free, bounded)
    return PolicyLoss(masked_mean(each if weights is None else each * weights, mask), clipped, kl, largest)


def truncated_weights(log_probs: Tensor, sampled: Tensor, mask: Tensor, cap: float) -> Tensor:
    """``min(exp(log_probs - sampled), cap)``: importance weights of tokens sampled at other log-probabilities.

    Truncated, they have a bounded variance for a small bias (Ionides 2008, "Truncated Importance Sampling").
    """
    return torch.where(mask.bool(), log_probs - sampled, 0.0).exp().clamp(max=cap)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, *, clip: float = 0.2) -> Tensor:
    """``mean max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2) / 2``; all ``[batch, tokens]``."""
    bounded = torch.minimum(torch.maximum(values, old - clip), old + clip)
    worse = torch.maximum((values - returns).square(), (bounded - returns).square())
    return masked_mean(worse, mask) / 2


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """``-log sigmoid(chosen - rejected - margin)`` of each pair of rewards ``[pairs]``."""
    return -F.logsigmoid(chosen - rejected - margin)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """DPO's loss and its implicit reward margin of each pair, ``[pairs]`` each.

    Args:
        chosen, rejected: log-probabilities of whole answers by the policy, ``[pairs]``, nats.
        reference_chosen, reference_rejected: by the reference.
        beta: weight of the KL term that the loss stands for.
        label_smoothing: probability that a label is flipped (Mitchell 2023, conservative DPO); below 0.5.

    Returns:
        ``-(1 - s) log sigmoid(m) - s log sigmoid(-m)`` and ``m = beta ((chosen - reference_chosen) - (rejected -
        reference_rejected))``.
    """
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label smoothing is at least 0 and below 0.5, not {label_smoothing}")
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    return loss, margin


@dataclass
class AdaptiveKL:
    """The KL coefficient, steered so that the KL of whole answers stays near a target (Ziegler et al. 2019, 2.2).

    ``beta <- beta (1 + gain e)``, ``e = clip(KL / target - 1, -0.2, 0.2)``.

    Attributes:
        coefficient: beta.
        target: KL of an answer in nats; None keeps the coefficient.
        gain: K_beta, 0.1 in the paper. OpenAI's code has episodes of a batch / 10,000.
    """

    coefficient: float
    target: float | None = None
    gain: float = 0.1

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            raise InputError(f"a KL coefficient is at least 0, not {self.coefficient}")
        if self.target is not None and not self.target > 0:
            raise InputError(f"a target KL is positive, not {self.target}; without one the coefficient stays")

    def update(self, kl: float) -> None:
        """Steer by the mean KL of the answers of a batch, in nats."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + self.gain * error
