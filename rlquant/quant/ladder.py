"""A ladder of mixed-precision schemes, by what each part of a network costs alone: a greedy knapsack.

From rung to rung one part goes down a step: the one that adds the least cost for each byte that it saves. Costs of
parts are taken to add up, which holds while each of them is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Step", "greedy_ladder"]


@dataclass(frozen=True)
class Step:
    """One way to store a part.

    Attributes:
        bytes: that it takes, in a unit that all parts share.
        cost: of storing this part so and nothing else, in any unit that all parts share.
    """

    bytes: float
    cost: float


def greedy_ladder(parts: Mapping[str, Sequence[Step]]) -> list[dict[str, int]]:
    """All rungs, from the first step of every part to the last.

    Args:
        parts: the steps of each, whose bytes fall.

    Returns:
        For each rung the index of every part's step; from rung to rung one index is greater by one.
    """
    at = dict.fromkeys(parts, 0)
    rungs = [dict(at)]
    while prices := {
        name: _price(steps, at[name]) for name, steps in parts.items() if at[name] + 1 < len(steps)
    }:
        at[min(prices, key=prices.__getitem__)] += 1
        rungs.append(dict(at))
    return rungs


def _price(steps: Sequence[Step], index: int) -> float:
    """Added cost a byte saved; where measuring says that fewer bits cost less, they cost nothing."""
    upper, lower = steps[index], steps[index + 1]
    return max(0.0, lower.cost - upper.cost) / (upper.bytes - lower.bytes)
