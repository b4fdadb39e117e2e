"""Auditions: quick, paired tries of many candidates, on episodes or windows that never score a policy.

A search looks at many schemes and keeps the lucky ones, so what it has looked at proves nothing: the winner is scored
again, elsewhere. Here it is enough to sort out. A candidate that is clearly good or clearly bad stops early; the
doubtful one goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike

from rlquant.measure.retention import compare

__all__ = ["Heard", "audition"]

_CONFIDENCE = 0.8


@dataclass(frozen=True)
class Heard:
    """What an audition came to.

    Attributes:
        retention: share of the reward that is kept; NaN where the reference itself is no better than random.
        episodes: that were played, or windows that were read.
        passed: whether the share is at least what was asked for, by the interval or at last by the value.
    """

    retention: float
    episodes: int
    passed: bool


def audition(
    scores: Callable[[int], tuple[ArrayLike, ArrayLike]],
    *,
    random_score: float,
    retain: float,
    stages: Sequence[int],
) -> Heard:
    """Audition a candidate.

    Args:
        scores: from a number of episodes to the scores of the reference and the candidate on the first so many,
            ``[n]`` each, higher is better.
        random_score: of a policy that knows nothing.
        retain: share of the reward that the candidate has to keep.
        stages: episodes in all after which it may be decided, at least one number.
    """
    for episodes in stages:
        reference, candidate = scores(episodes)
        found = compare(
            reference,
            candidate,
            random_score=random_score,
            margin=max(0.0, 1 - retain),
            confidence=_CONFIDENCE,
        )
        if found.verdict != "undecided":
            break
    passed = found.verdict == "retained" or (found.verdict == "undecided" and found.value >= retain)
    return Heard(found.value, episodes, passed)
