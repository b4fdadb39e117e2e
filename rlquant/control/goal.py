"""What a search is asked for, what it tries and what it comes to."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rlquant.control.agent import Agent
from rlquant.control.sensitivity import Sensitivity
from rlquant.errors import InputError

__all__ = ["Goal", "Trial", "Tuned"]


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        retain: share of the reward to keep, above 0 and at most 1.
        memory: bytes that the weights, scales and biases may take.
        deadline: seconds that an action may take, in 99 of 100 cases, on this machine.
    """

    retain: float = 0.98
    memory: int | None = None
    deadline: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.retain <= 1:
            raise InputError(
                f"--retain is the share of the reward to keep, above 0 and at most 1, not {self.retain}"
            )


@dataclass(frozen=True)
class Trial:
    """One scheme by one method, auditioned.

    Attributes:
        scheme, method: names.
        bytes: of weights, scales and biases.
        retention: in the audition; NaN where fp32 is no better than random.
        episodes: of the audition.
        passed: whether it kept what was asked for.
        latency: of an action, p99 in seconds; None where no deadline asked for it.
    """

    scheme: str
    method: str
    bytes: int
    retention: float
    episodes: int
    passed: bool
    latency: float | None = None


@dataclass
class Tuned:
    """The outcome.

    Attributes:
        agent: the cheapest that was proved, or the best found.
        held: whether every part of the goal holds.
        results: ``settings``, ``reference`` and ``rows`` of the proofs, as in results.json.
        trials: all auditions.
        sensitivity: of every tensor.
        reasons: sentences, in the order of the search.
    """

    agent: Agent
    held: bool
    results: dict[str, Any]
    trials: list[Trial]
    sensitivity: list[Sensitivity]
    reasons: list[str] = field(default_factory=list)

    @property
    def front(self) -> list[Trial]:
        """The auditions that no other beats in both bytes and retention, from the cheapest."""
        ordered = sorted(self.trials, key=lambda trial: (trial.bytes, -trial.retention))
        best, front = -math.inf, []
        for trial in ordered:
            if trial.retention > best:
                front.append(trial)
                best = trial.retention
        return front

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema": "rlquant.tune/1",
            "chosen": {"precision": self.agent.precision, "method": self.agent.method, "held": self.held},
            "reasons": self.reasons,
            "front": [asdict(trial) for trial in self.front],
            "trials": [asdict(trial) for trial in self.trials],
            "sensitivity": [asdict(each) for each in self.sensitivity],
        }
