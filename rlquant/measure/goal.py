"""What a search is asked for, what it tries and what it comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlquant.errors import InputError

__all__ = ["Goal", "Outcome", "Sensitivity", "Trial", "short_name"]

_SPELLED_OUT = 4  # parts of a name that still fit on a line


def short_name(name: str) -> str:
    """A scheme's name for tables and sentences: of many exceptions only the number.

    >>> short_name("w4a8+trunk.0=w8a8")
    'w4a8+trunk.0=w8a8'
    >>> short_name("int4-g128+layers.0.*=int8+layers.1.*=int8+layers.7.*=int8+embedding=int8")
    'int4-g128+embedding=int8+3 exceptions'
    """
    base, *rest = name.split("+")
    if len(rest) < _SPELLED_OUT:
        return name
    embedding = [part for part in rest if part.startswith("embedding=")]
    return "+".join([base, *embedding, f"{len(rest) - len(embedding)} exceptions"])


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
class Sensitivity:
    """The cost of one tensor, or of one part's tensors, at some bits while all others stay in float.

    Attributes:
        layer: qualified name in the network.
        role: what it does there.
        tensor: ``weights`` or ``input``.
        bits: of that tensor.
        divergence: of the outputs from the float policy's; 0 for none.
        retention: share of the reward that is kept; None where that was not measured.
    """

    layer: str
    role: str
    tensor: str
    bits: int
    divergence: float
    retention: float | None


@dataclass(frozen=True)
class Trial:
    """One scheme by one method, auditioned.

    Attributes:
        scheme, method: names.
        bytes: of weights, scales and biases.
        retention: in the audition; NaN where the reference is no better than random.
        episodes: of the audition; windows of text for a language model.
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


@dataclass(kw_only=True)
class Outcome:
    """What a search comes to.

    Attributes:
        chosen: the cheapest that was proved, or the best found.
        held: whether every part of the goal holds.
        results: ``settings``, ``reference`` and ``rows`` of the proofs, as in results.json.
        trials: all auditions.
        reasons: sentences, in the order of the search.
        sensitivity: of every tensor.
    """

    chosen: Trial
    held: bool
    results: dict[str, Any]
    trials: list[Trial]
    reasons: list[str]
    sensitivity: Sequence[Sensitivity] = field(default_factory=list)

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
            "chosen": {"precision": self.chosen.scheme, "method": self.chosen.method, "held": self.held},
            "reasons": self.reasons,
            "front": [asdict(trial) for trial in self.front],
            "trials": [asdict(trial) for trial in self.trials],
            "sensitivity": [asdict(each) for each in self.sensitivity],
        }
