"""How far a student's outputs are from its teacher's, in terms of the actions that they lead to.

An argmax is unmoved by an offset common to all actions and is decided by the gap between the best two, so
outputs are centred over actions, divided by the teacher's gap and compared as a policy: the KL divergence
from the teacher's softmax to the student's, with a little squared error, which keeps its gradient where both
policies are sure. Where the gap is smaller than is typical, the typical one takes its place. Without a scale of
its own, a state where the teacher is a hundred times as sure would count ten thousand times as much, and the
student would learn large values of lost states instead of close decisions.

Numbers are compared after the head's tanh or clip, because beyond saturation they act alike, with a little of
the difference before it, so that a student saturated on the wrong side finds back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rlquant.control.head import Head

__all__ = ["Imitation", "imitation_loss"]

Imitation = Callable[[Tensor, Tensor], Tensor]
"""From outputs of student and teacher, ``[n, outputs]`` each, to a scalar."""

SHARPNESS = 2.0
"""The teacher's softmax gives its best action ``exp(SHARPNESS)`` times the odds of the next, or less."""

SQUARED_SHARE = 0.1
PRE_SQUASH_SHARE = 0.01
CLIP_OVERSHOOT = 1.2  # beyond the bounds by so much, as a share of the half range, means still "clipped"


def imitation_loss(head: Head, labels: Tensor) -> Imitation:
    """The loss for a head.

    Args:
        head: of teacher and student.
        labels: outputs of the teacher ``[n, outputs]`` on its own episodes, which say what gap is typical.
    """
    if head.kind in ("argmax", "multi_argmax"):
        return _Choices(list(head.space.sizes), labels)
    if head.kind == "threshold":
        return _switches
    if head.kind == "tanh":
        return _squashed
    low, high = (torch.from_numpy(bound.ravel()) for bound in head.space.bounds())
    return _Clipped(low, high, labels)


class _Choices:
    """Logits or Q-values, in one or more branches."""

    def __init__(self, sizes: list[int], labels: Tensor) -> None:
        self.sizes = sizes
        self.gaps = [self._typical_gap(branch) for branch in torch.split(labels, sizes, dim=1)]

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        total = outputs.new_zeros(())
        branches = zip(
            torch.split(outputs, self.sizes, dim=1),
            torch.split(labels, self.sizes, dim=1),
            self.gaps,
            strict=True,
        )
        for student, teacher, gap in branches:
            scale = _gaps(teacher).clamp(min=gap)
            student, teacher = (_centred(x) / scale for x in (student, teacher))
            policy = (SHARPNESS * teacher).softmax(dim=1)
            total = total + F.kl_div((SHARPNESS * student).log_softmax(dim=1), policy, reduction="batchmean")
            total = total + SQUARED_SHARE * F.mse_loss(student, teacher)
        return total

    @staticmethod
    def _typical_gap(branch: Tensor) -> float:
        return float(_gaps(branch).median().clamp(min=1e-6)) if branch.shape[1] > 1 else 1.0


class _Clipped:
    """Numbers clipped to the action bounds, or squashed by the network itself; unbounded where bounds are not."""

    def __init__(self, low: Tensor, high: Tensor, labels: Tensor) -> None:
        bounded = low.isfinite() & high.isfinite()
        spread = labels.std(dim=0).clamp(min=1e-6)
        self.middle = torch.where(bounded, (low + high) / 2, labels.mean(dim=0))
        self.half = torch.where(bounded, (high - low) / 2, spread)
        self.limit = torch.where(bounded, CLIP_OVERSHOOT, torch.inf)

    def __call__(self, outputs: Tensor, labels: Tensor) -> Tensor:
        student, teacher = ((x - self.middle) / self.half for x in (outputs, labels))
        clipped = F.mse_loss(student.clamp(-self.limit, self.limit), teacher.clamp(-self.limit, self.limit))
        return clipped + PRE_SQUASH_SHARE * F.smooth_l1_loss(student, teacher)


def _squashed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs.tanh(), labels.tanh()) + PRE_SQUASH_SHARE * F.smooth_l1_loss(outputs, labels)


def _switches(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, labels.sigmoid()) + SQUARED_SHARE * F.mse_loss(
        outputs.clamp(-4, 4), labels.clamp(-4, 4)
    )


def _gaps(outputs: Tensor) -> Tensor:
    """By how much the best action leads, ``[n, 1]``; 0 where there is but one."""
    if outputs.shape[1] < 2:
        return torch.zeros_like(outputs)
    best = outputs.topk(2, dim=1).values
    return best[:, :1] - best[:, 1:]


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=1, keepdim=True)
