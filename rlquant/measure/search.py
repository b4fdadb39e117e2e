"""The search for the cheapest scheme that reaches a goal, whatever kind of policy it is for.

1. *Bisection*: for each method the cheapest scheme that passes an audition (:mod:`~rlquant.measure.audition`), as if
   whatever is dearer passed too.
2. *Proof*: those that passed are scored, the cheapest first, where nothing was looked at before, until one is
   retained. What passes an audition at the line may well fail there, so then dearer schemes are tried, each time twice
   as many rungs up. Each of up to :data:`PROOFS` proofs has its share of the error (Bonferroni).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlquant.measure.goal import Goal, Outcome, Trial, short_name

__all__ = ["PROOFS", "Candidates", "Search", "proof_confidence"]

PROOFS = 4

_SPACING = 0.97  # schemes that save less than this share of the bytes are not worth an audition


def proof_confidence(confidence: float) -> float:
    """Confidence of each of up to ``PROOFS`` proofs, so that all of them together have ``confidence``."""
    return 1 - (1 - confidence) / PROOFS


class Candidates(Protocol):
    """What a search needs to know of a policy.

    Attributes:
        kept: what has to be kept, in words: ``the reward``.
        unit: what auditions are made of: ``audition episodes``.
    """

    kept: str
    unit: str

    def audition(self, scheme: str, method: str) -> Trial:
        """Quantize and try. Raises InputError where the method cannot do the scheme."""

    def prove(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """``settings``, ``reference`` and ``rows`` of results.json: the reference's row, then one for each trial."""


@dataclass(frozen=True)
class _Proof:
    trial: Trial
    row: dict[str, Any]


class Search:
    """One search.

    Args:
        goal: what has to hold.
        candidates: the policy's.
        methods: that may be used.
        progress: called with a sentence at each step.
    """

    def __init__(
        self,
        goal: Goal,
        candidates: Candidates,
        *,
        methods: Sequence[str],
        progress: Callable[[str], None] = lambda _sentence: None,
    ) -> None:
        self.goal, self.candidates, self.methods, self.progress = goal, candidates, methods, progress
        self.trials: dict[tuple[str, str], Trial] = {}
        self._asked: dict[Trial, str] = {}  # the method that was asked for; "auto" chooses another
        self.reasons: list[str] = []

    def run(self, sizes: Mapping[str, int]) -> Outcome:
        """Search the schemes whose bytes ``sizes`` gives."""
        rungs = self._affordable(sizes)
        self._climb(rungs)
        proof, results = self._prove(rungs)
        held = self._judge(proof, results)
        return Outcome(
            chosen=proof.trial,
            held=held,
            results=results,
            trials=list(self.trials.values()),
            reasons=self.reasons,
        )

    def _affordable(self, sizes: Mapping[str, int]) -> list[str]:
        """Schemes that fit into memory, the cheapest first, less those that hardly differ in bytes."""
        kept: list[str] = []
        limit = self.goal.memory
        fitting = [name for name in sizes if limit is None or sizes[name] <= limit]
        for name in sorted(fitting, key=sizes.__getitem__):
            if not kept or sizes[kept[-1]] <= _SPACING * sizes[name]:
                kept.append(name)
        if limit is None:
            return kept
        if not kept:
            smallest = min(sizes, key=sizes.__getitem__)
            size = sizes[smallest]
            self._say(f"even {short_name(smallest)} takes {size:,} bytes, {size - limit:,} too many")
            return [smallest]
        kept[-1] = max(fitting, key=sizes.__getitem__)  # what a limit is for may be all of it
        if len(fitting) < len(sizes):
            self._say(f"{len(sizes) - len(fitting)} of {len(sizes)} schemes do not fit into {limit:,} bytes")
        return kept

    def _climb(self, rungs: list[str]) -> None:
        """Bisect the rungs by each method; a later method only looks below what an earlier one reached."""
        ceiling = len(rungs)
        for method in self.methods:
            low, high = 0, ceiling
            while low < high:
                middle = (low + high) // 2
                if self._try(rungs[middle], method).passed:
                    high = middle
                else:
                    low = middle + 1
            ceiling = min(ceiling, high)

    def _try(self, rung: str, method: str) -> Trial:
        self.progress(f"trying {short_name(rung)} by {method}")
        trial = self.candidates.audition(rung, method)
        self.trials[rung, trial.method] = trial
        self._asked[trial] = method
        late = self._late(trial)
        slow = f", but takes {1e6 * (trial.latency or 0):.0f} us" if late else ""
        verb = "passes" if trial.passed else "fails"
        self._say(
            f"{_name(trial)} ({trial.bytes:,} bytes) {verb}: it keeps {100 * trial.retention:.1f}% "
            f"over {trial.episodes} {self.candidates.unit}{slow}"
        )
        return trial

    def _late(self, trial: Trial) -> float:
        """Seconds beyond the deadline."""
        if self.goal.deadline is None or trial.latency is None:
            return 0.0
        return max(0.0, trial.latency - self.goal.deadline)

    def _prove(self, rungs: list[str]) -> tuple[_Proof, dict[str, Any]]:
        """Score candidates until one is retained; the best of them, and all results."""
        proved: list[Trial] = []
        results: dict[str, Any] = {}
        for trial in itertools.islice(self._contenders(rungs), PROOFS):
            proved.append(trial)
            self.progress(f"proving {_name(trial)}")
            results = self.candidates.prove(proved)
            verdict = results["rows"][-1]["retention"]
            if verdict["verdict"] == "retained":
                return _Proof(trial, results["rows"][-1]), results
            self._say(f"{_name(trial)} is not proved: {verdict['reason']}")
        proofs = [_Proof(*pair) for pair in zip(proved, results["rows"][1:], strict=True)]
        return max(proofs, key=lambda proof: _value(proof.row["retention"]["value"])), results

    def _contenders(self, rungs: list[str]) -> Iterator[Trial]:
        """What passed, the cheapest first, then what passes further up; where nothing did, the best alone."""
        ordered = sorted(self.trials.values(), key=lambda trial: trial.bytes)
        passing = [trial for trial in ordered if trial.passed]
        if not passing:
            yield max(ordered, key=lambda trial: _value(trial.retention))
            return
        yield from passing
        at, step, method = rungs.index(passing[-1].scheme), 1, self._asked[passing[-1]]
        while at + 1 < len(rungs):
            at, step = min(at + step, len(rungs) - 1), 2 * step
            trial = self._try(rungs[at], method)
            if trial.passed:
                yield trial

    def _judge(self, proof: _Proof, results: dict[str, Any]) -> bool:
        """Whether the goal holds; says so, or by how much it is missed."""
        trial, reference = proof.trial, results["rows"][0]
        smaller = reference["bytes"]["weights"] / trial.bytes
        name = f"{_name(trial)} ({trial.bytes:,} bytes, {smaller:.1f}x smaller than {reference['precision']})"
        misses = self._misses(proof)
        if misses:
            self._say(f"no scheme reaches the goal; the best found, {name}, misses {' and '.join(misses)}")
        else:
            self._say(f"{name} is the cheapest that is proved: {proof.row['retention']['reason']}")
        return not misses

    def _misses(self, proof: _Proof) -> list[str]:
        trial, retention, goal = proof.trial, proof.row["retention"], self.goal
        misses = []
        if retention["verdict"] != "retained":
            value = retention["value"]
            short = f"by {100 * (goal.retain - value):.1f} points" if value is not None else "(undefined)"
            missed = value is None or value < goal.retain
            misses.append(
                f"{self.candidates.kept} {short}"
                if missed
                else "the proof: the interval reaches below the goal"
            )
        if goal.memory is not None and trial.bytes > goal.memory:
            misses.append(f"the memory by {trial.bytes - goal.memory:,} bytes")
        if late := self._late(trial):
            misses.append(f"the deadline by {1e6 * late:.0f} us")
        return misses

    def _say(self, sentence: str) -> None:
        self.reasons.append(sentence)
        self.progress(sentence)


def _name(trial: Trial) -> str:
    return f"{short_name(trial.scheme)} by {trial.method}"


def _value(retention: float | None) -> float:
    """For comparing: what is undefined is worst."""
    return -math.inf if retention is None or math.isnan(retention) else retention
