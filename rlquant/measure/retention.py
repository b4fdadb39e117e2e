"""How much of the reference's reward a candidate keeps, with an interval and a verdict.

    retention = (mean(candidate) - random_score) / (mean(reference) - random_score)

A raw ratio of returns misleads where returns are negative or near zero; measured from the random policy's
score it is 1 for "as good as the reference" and 0 for "as good as acting at random", and does not change when
all scores are shifted or scaled.

The interval is a paired bootstrap: one resample draws the same episodes for both policies, so luck that both
share (the initial state) cancels. It uses percentiles rather than BCa because they commute with the ratio:
while the denominator is positive, "ratio >= c" is the same event as
"mean(candidate - c * reference - (1 - c) * random) >= 0". The verdict is then exactly a one-sided paired
bootstrap test of that linear contrast at c = 1 - margin, free of the bias of ratios and of an acceleration
constant estimated from few episodes.

The verdict is a non-inferiority test (as in drug trials): keeping the reward must be shown, not merely not
refuted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from rlquant.errors import InputError
from rlquant.measure.statistics import (
    Interval,
    as_scores,
    check_confidence,
    resampled_means,
    tail_probability,
)

__all__ = ["MORE_EPISODES_CAP", "Retention", "Verdict", "compare"]

Verdict = Literal["retained", "lost", "undecided"]

MORE_EPISODES_CAP = 10_000
"""``Retention.more_episodes`` never exceeds this; at the cap the value sits (nearly) on the line."""

_POWER = 0.8  # chance that the episodes asked for decide, if the true ratio is the measured one
_TOLERANCE = 1e-12  # rounding of a mean must not turn a tie with the line into a loss
_NO_INTERVAL: Interval = (math.nan, math.nan)


@dataclass(frozen=True)
class Retention:
    """The share of reward kept.

    Attributes:
        value: the ratio; NaN where the reference is not clearly better than random.
        ci: (low, high) of the ratio; NaN where it is undefined.
        verdict: "retained" (ci low >= 1 - margin), "lost" (ci high < 1 - margin) or "undecided".
        more_episodes: how many more episodes would decide with 80% probability, if the true ratio is the one
            measured; None when decided or when no number would help. At most MORE_EPISODES_CAP.
        reason: one sentence that says why.
    """

    value: float
    ci: Interval
    verdict: Verdict
    more_episodes: int | None
    reason: str

    @classmethod
    def of_reference(cls) -> Retention:
        """The reference compared with itself: it keeps everything, by definition."""
        return cls(1.0, (1.0, 1.0), "retained", None, "this is the reference")


def compare(
    reference: ArrayLike,
    candidate: ArrayLike,
    *,
    random_score: float,
    margin: float = 0.02,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Retention:
    """Compare a candidate with the reference on the same episodes.

    Args:
        reference: array [n], score of the reference per episode.
        candidate: array [n], score of the candidate; entry i comes from the same episode seed as
            reference[i].
        random_score: mean score of a random policy, in the unit of the scores.
        margin: share of the reward that may be lost, 0 <= margin < 1.
        confidence: of the two-sided interval. A sequential run that looks k times passes
            1 - (1 - confidence) / k (Bonferroni), or repeated looking inflates its errors.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        The retention. It is "undecided" whatever the numbers for so few episodes that their resamples cannot
        resolve the interval's tails (fewer than 5 at 95%).

    Raises:
        InputError: empty, non-finite or unequally long arrays; a margin or confidence out of range.
    """
    reference, candidate = as_scores(reference, "reference"), as_scores(candidate, "candidate")
    _check(reference, candidate, random_score, margin)
    check_confidence(confidence, resamples)
    n = reference.size
    gains = np.stack([candidate - random_score, reference - random_score], axis=1)
    gain, reference_gain = gains.mean(axis=0)
    if n == 1:
        value = float(gain / reference_gain) if reference_gain > 0 else math.nan
        return Retention(
            value, _NO_INTERVAL, "undecided", _fewest(confidence) - 1, "one episode has no interval"
        )
    means = resampled_means(gains, resamples, seed)
    tail = tail_probability(n, confidence)
    floor = float(np.quantile(means[:, 1], tail, method="lower"))
    scale = max(abs(random_score), float(np.abs(reference).max()))
    if floor <= _TOLERANCE * scale:
        return _no_reward(reference_gain, floor, n, confidence)
    value = float(gain / reference_gain)
    return _judge(value, _ratio_interval(means, tail), n, 1 - margin, confidence)


def _check(
    reference: NDArray[np.float64], candidate: NDArray[np.float64], random_score: float, margin: float
) -> None:
    if reference.size != candidate.size:
        raise InputError(
            f"reference has {reference.size} episodes and candidate {candidate.size}; "
            "a paired comparison needs the same episode seeds for both"
        )
    if not math.isfinite(random_score):
        raise InputError(f"random_score must be a finite number, not {random_score}")
    if not 0.0 <= margin < 1.0:
        raise InputError(f"margin must be at least 0 and below 1, not {margin}; 0.02 allows a loss of 2%")


def _ratio_interval(means: NDArray[np.float64], tail: float) -> Interval:
    """Percentiles of gain / reference gain over resamples [resamples, 2].

    A resample whose reference gain is not positive says nothing about the ratio: it counts as -inf for the
    lower and +inf for the upper end, which only widens the interval. The caller's check of the reference
    keeps such resamples below ``tail``, so both ends are finite.
    """
    usable = means[:, 1] > 0
    ratio = np.divide(means[:, 0], means[:, 1], out=np.zeros(len(means)), where=usable)
    low = np.quantile(np.where(usable, ratio, -np.inf), tail, method="lower")
    high = np.quantile(np.where(usable, ratio, np.inf), 1 - tail, method="higher")
    return float(low), float(high)


def _no_reward(reference_gain: float, floor: float, n: int, confidence: float) -> Retention:
    reason = (
        f"the reference is not clearly better than random: its mean minus the random score is "
        f"{reference_gain:.4g} and the {_percent(confidence)} interval of that gain starts at {floor:.4g}, "
        "so there is no reward to keep"
    )
    more = (
        _more_episodes(reference_gain - floor, reference_gain, n, confidence) if reference_gain > 0 else None
    )
    return Retention(math.nan, _NO_INTERVAL, "undecided", more, reason)


def _judge(value: float, ci: Interval, n: int, line: float, confidence: float) -> Retention:
    low, high = ci
    span = f"the {_percent(confidence)} interval [{low:.4g}, {high:.4g}]"
    fewest = _fewest(confidence)
    if n < fewest:
        reason = f"{n} are too few for {_percent(confidence)} confidence: at least {fewest} are needed"
        return Retention(value, ci, "undecided", fewest - n, reason)
    if low >= line - _TOLERANCE:
        return Retention(value, ci, "retained", None, f"{span} starts at or above {line:.4g}")
    if high < line - _TOLERANCE:
        return Retention(value, ci, "lost", None, f"{span} ends below {line:.4g}")
    reach = value - low if value >= line else high - value
    more = _more_episodes(reach, abs(value - line), n, confidence)
    reason = f"{span} contains {line:.4g}"
    if more == MORE_EPISODES_CAP:
        reason += f", and {value:.4g} lies so near it that even {more} more might not decide"
    return Retention(value, ci, "undecided", more, reason)


def _more_episodes(reach: float, distance: float, n: int, confidence: float) -> int:
    """Episodes to add to ``n`` so that an interval end, now ``reach`` off, clears a line ``distance`` off.

    An interval shrinks as 1 / sqrt(n). To shrink it to ``distance`` would decide only half of the time, for
    the next value falls on either side of this one: it has to shrink by a power calculation's factor more.
    """
    z = float(ndtri(0.5 + confidence / 2))
    growth = (reach / distance * (1 + float(ndtri(_POWER)) / z)) ** 2 if distance > 0 else math.inf
    if growth > 1 + MORE_EPISODES_CAP / n:
        return MORE_EPISODES_CAP
    return max(1, math.ceil(n * growth) - n)


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.6g}%"


def _fewest(confidence: float) -> int:
    """The smallest n whose rarest resample (probability n**-n) is no likelier than an interval's tail."""
    n = 2
    while -n * math.log(n) > math.log(max(tail_probability(n, confidence), 1e-300)):
        n += 1
    return n
