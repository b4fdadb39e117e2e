"""Statistics of per-episode scores: robust means and bootstrap intervals.

A score is one number per episode (or per prompt), higher is better. All functions are deterministic: the same
scores and the same ``seed`` give the same numbers, on any machine.

Sources: Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice" (IQM); Efron and Tibshirani
1993 (percentile bootstrap); Hesterberg 2015, "What Teachers Should Know About the Bootstrap" (the expanded
percentile interval).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

from rlquant.errors import InputError

__all__ = [
    "Interval",
    "as_scores",
    "check_confidence",
    "iqm",
    "mean_interval",
    "resampled_means",
    "std",
    "tail_probability",
    "worst_decile",
]

Interval = tuple[float, float]

_CHUNK_VALUES = 4_000_000  # resampled values held at once: 32 MB of indices


def as_scores(scores: ArrayLike, name: str = "scores") -> NDArray[np.float64]:
    """``scores`` as a float64 array.

    Args:
        scores: array [n], one finite number per episode, n >= 1.
        name: what to call the array in an error.

    Raises:
        InputError: it is not one-dimensional, is empty, or holds NaN or infinity.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 1:
        raise InputError(f"{name} must have shape [episodes], not {list(array.shape)}")
    if array.size == 0:
        raise InputError(f"{name} holds no episode; evaluate at least one")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InputError(
            f"{name} holds {array[bad[0]]} at episode {bad[0]} ({bad.size} of {array.size} are not finite); "
            "statistics need finite scores"
        )
    return array


def check_confidence(confidence: float, resamples: int) -> None:
    """Raise InputError unless 0 < confidence < 1 and there is at least one resample."""
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence must lie between 0 and 1, not {confidence}; 0.95 is usual")
    if resamples < 1:
        raise InputError(f"resamples must be at least 1, not {resamples}; 10000 is usual")


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean: the mean after dropping the lowest and the highest quarter (floor(n / 4) each).

    Args:
        scores: array [n].
    """
    ordered = np.sort(as_scores(scores))
    cut = ordered.size // 4
    return float(ordered[cut : ordered.size - cut].mean())


def worst_decile(scores: ArrayLike) -> float:
    """Mean of the worst ceil(n / 10) episodes: what a bad day looks like.

    Args:
        scores: array [n].
    """
    ordered = np.sort(as_scores(scores))
    return float(ordered[: math.ceil(ordered.size / 10)].mean())


def std(scores: ArrayLike) -> float:
    """Sample standard deviation (n - 1 in the denominator); NaN for one episode.

    Args:
        scores: array [n].
    """
    array = as_scores(scores)
    return float(array.std(ddof=1)) if array.size > 1 else math.nan


def tail_probability(n: int, confidence: float) -> float:
    """Share of bootstrap resamples to leave out on each side of an interval from ``n`` >= 2 episodes.

    The plain percentile interval takes (1 - confidence) / 2, which is too narrow for few episodes: the
    bootstrap divides the variance by n instead of n - 1 and uses normal instead of Student quantiles. The
    expanded percentile interval (Hesterberg 2015) takes Phi(-sqrt(n / (n - 1)) * t) with the Student quantile
    t of n - 1 degrees of freedom, so that it equals the t interval on normal scores and keeps the bootstrap's
    shape on others.
    """
    student = stdtrit(n - 1, 0.5 + confidence / 2)
    return float(ndtr(-math.sqrt(n / (n - 1)) * student))


def resampled_means(columns: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of bootstrap resamples of the rows; every column sees the same rows (this is what pairs them).

    Args:
        columns: float64 array [n, k]; row i holds the k numbers of episode i.
        resamples: how many times n rows are drawn with replacement.
        seed: of the draw.

    Returns:
        float64 array [resamples, k]. Memory stays below about 100 MB whatever n and ``resamples``.
    """
    n, k = columns.shape
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, k))
    step = max(1, _CHUNK_VALUES // n)
    for start in range(0, resamples, step):
        rows = rng.integers(0, n, size=(min(step, resamples - start), n))
        for j in range(k):
            means[start : start + step, j] = columns[:, j][rows].mean(axis=1)
    return means


def mean_interval(
    scores: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Bootstrap interval of the mean (expanded percentile, see :func:`tail_probability`).

    Args:
        scores: array [n].
        confidence: coverage, between 0 and 1.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        (low, high), in the unit of the scores; (NaN, NaN) for one episode, which has no interval.

    Raises:
        InputError: empty or non-finite scores, or a confidence outside (0, 1).
    """
    array = as_scores(scores)
    check_confidence(confidence, resamples)
    if array.size == 1:
        return math.nan, math.nan
    means = resampled_means(array[:, None], resamples, seed)[:, 0]
    tail = tail_probability(array.size, confidence)
    return float(np.quantile(means, tail, method="lower")), float(
        np.quantile(means, 1 - tail, method="higher")
    )
