"""How often two policies choose the same action in the same states.

Agreement is measured on one shared set of observations (those of the reference), so it is the error of a
single step. It does not predict the return: small disagreements compound along a trajectory, and many do no
harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlquant.errors import InputError

__all__ = ["ACTION_TOLERANCE", "Agreement", "QGap", "action_agreement", "q_gap"]

ACTION_TOLERANCE = 0.01
"""Continuous actions agree when every component differs by at most this share of its range."""


@dataclass(frozen=True)
class QGap:
    """Difference between the best and the second best Q value of a state, over many states.

    Attributes:
        p1: 1st percentile of the gap. p10, p50: likewise.
        may_flip: share of states whose gap is no larger than the largest error that the candidate makes in
            any difference of two Q values of a state: the states in which the argmax is not safe. None
            without a candidate.
    """

    p1: float
    p10: float
    p50: float
    may_flip: float | None


@dataclass(frozen=True)
class Agreement:
    """Attributes: ``action``, share of equal actions in 0..1; ``max_abs``, largest difference; ``q_gap``."""

    action: float
    max_abs: float | None
    q_gap: QGap | None = None


def action_agreement(
    reference_actions: ArrayLike,
    candidate_actions: ArrayLike,
    discrete: bool,
    *,
    reference_outputs: ArrayLike | None = None,
    candidate_outputs: ArrayLike | None = None,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
) -> Agreement:
    """Compare actions chosen in the same n states.

    Discrete actions agree when equal (all branches of a MultiDiscrete). Continuous ones agree when every
    component lies within ACTION_TOLERANCE of its range: ``high - low`` where the action space is bounded,
    otherwise the range of the reference's own actions.

    Args:
        reference_actions: array [n] or [n, branches or dimensions].
        candidate_actions: array of the same shape.
        discrete: whether actions are indices.
        reference_outputs: array [n, outputs], what the head computes before the action is chosen (Q values,
            logits); with ``candidate_outputs`` it gives ``max_abs`` for discrete actions.
        candidate_outputs: array of the same shape as ``reference_outputs``.
        low: lower bounds of continuous actions, array [dimensions] or a number.
        high: upper bounds.

    Returns:
        ``max_abs`` is the largest difference of the outputs where given, else of continuous actions, else
        None.

    Raises:
        InputError: arrays that are empty or differ in shape.
    """
    reference, candidate = _paired(reference_actions, candidate_actions, "actions")
    difference = np.abs(candidate - reference)
    if discrete:
        same, max_abs = difference == 0, None
    else:
        same = difference <= ACTION_TOLERANCE * _action_range(reference, low, high)
        max_abs = float(difference.max())
    if reference_outputs is not None and candidate_outputs is not None:
        before, after = _paired(reference_outputs, candidate_outputs, "outputs")
        max_abs = float(np.abs(after - before).max())
    return Agreement(float(same.all(axis=1).mean()), max_abs)


def q_gap(q_values: ArrayLike, candidate_q_values: ArrayLike | None = None) -> QGap:
    """Summarise how clearly a value-based policy prefers its action.

    An offset common to all actions of a state cannot change the argmax, so the candidate's error is measured
    in
    differences: the spread (max - min over actions) of its error, at its largest over the states.

    Args:
        q_values: array [n, actions] of the reference, at least two actions.
        candidate_q_values: array [n, actions] of the candidate in the same states.

    Raises:
        InputError: fewer than two actions, no state, or arrays that differ in shape.
    """
    reference, candidate = _paired(
        q_values, q_values if candidate_q_values is None else candidate_q_values, "Q values"
    )
    if reference.shape[1] < 2:
        raise InputError(
            f"a Q-gap needs Q values of shape [states, actions >= 2], not {list(reference.shape)}"
        )
    ordered = np.sort(reference, axis=1)
    gaps = ordered[:, -1] - ordered[:, -2]
    p1, p10, p50 = np.percentile(gaps, [1, 10, 50])
    may_flip = None
    if candidate_q_values is not None:
        spread = np.ptp(candidate - reference, axis=1).max()
        may_flip = float((gaps <= spread).mean()) if spread > 0 else 0.0
    return QGap(float(p1), float(p10), float(p50), may_flip)


def _paired(a: ArrayLike, b: ArrayLike, what: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as float64 arrays [n, values]."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise InputError(
            f"{what} differ in shape: reference {list(first.shape)}, candidate {list(second.shape)}"
        )
    if first.size == 0:
        raise InputError(f"there are no {what} to compare")
    return first.reshape(len(first), -1), second.reshape(len(second), -1)


def _action_range(
    reference: NDArray[np.float64], low: ArrayLike | None, high: ArrayLike | None
) -> NDArray[np.float64]:
    """Range of each component, array [dimensions]; without finite bounds, that of the reference's actions."""
    own: NDArray[np.float64] = np.ptp(reference, axis=0)
    if low is None or high is None:
        return own
    bounded = (np.asarray(high, dtype=np.float64) - np.asarray(low, dtype=np.float64)).reshape(-1)
    return np.where(np.isfinite(bounded), bounded, own)
