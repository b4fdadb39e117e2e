"""The end of every fine-tuning run: what was learned, and how much of it the deployed model keeps.

Base, tuned and merged models are scored on the same held-out rows. The gain is the paired difference of tuned and
base; what a merged model keeps of it is ``(R_merged - R_base) / (R_tuned - R_base)``, the retention of every other
evaluation with the base in the place of random play.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.llm.evaluate import subject
from rlquant.llm.model import LanguageModel
from rlquant.measure import (
    Measurement,
    Retention,
    Score,
    Size,
    compare,
    mean_interval,
    plain,
    results_document,
)
from rlquant.runs import machine_info, package_versions

__all__ = ["Contender", "Outcome"]


@dataclass(frozen=True)
class Contender:
    """One model, scored.

    Attributes:
        precision, method: how its weights are stored; the tuned one's method is the recipe.
        scores: of each held-out row, float64 ``[n]``.
        weights: bytes of its weights, adapters included.
        notes: what else was measured, by name.
    """

    precision: str
    method: str
    scores: NDArray[np.float64]
    weights: int
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """All contenders of one run.

    Attributes:
        task: what was learned, such as ``dpo``.
        score: what a score is, in words, such as ``share of pairs whose chosen answer is likelier``.
        sample: one held-out row, in a word.
        base, tuned: before and after.
        merged: tuned models without adapters.
    """

    task: str
    score: str
    sample: str
    base: Contender
    tuned: Contender
    merged: Sequence[Contender] = ()

    def gain(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Any]:
        """Base, tuned and their paired difference with its interval."""
        difference = self.tuned.scores - self.base.scores
        return {
            "base": float(self.base.scores.mean()),
            "tuned": float(self.tuned.scores.mean()),
            "difference": float(difference.mean()),
            "ci": mean_interval(difference, confidence, seed=seed),
            "score": self.score,
            "sample": self.sample,
            "notes": {name: [self.base.notes.get(name), value] for name, value in self.tuned.notes.items()},
        }

    def document(
        self,
        lm: LanguageModel,
        settings: Mapping[str, Any],
        *,
        device: str,
        margin: float = 0.1,
        seed: int = 0,
    ) -> dict[str, Any]:
        """The results document. ``margin`` is the share of the gain that a merged model may lose."""
        floor = float(self.base.scores.mean())
        rows = []
        for each in (self.tuned, *self.merged):
            kept = Retention.of_reference()
            if each is not self.tuned:
                kept = compare(self.tuned.scores, each.scores, random_score=floor, margin=margin, seed=seed)
            measurement = Measurement(
                precision=each.precision,
                method=each.method,
                runtime="torch",
                score=Score.from_episodes(each.scores, seed=seed),
                retention=kept,
                bytes=Size(each.weights),
                compression=self.tuned.weights / each.weights,
            )
            rows.append(measurement.to_row() | {"notes": dict(each.notes)})
        about = {**settings, "margin": margin, "confidence": 0.95, "task": self.task}
        document = results_document(
            subject=subject(lm),
            settings=about,
            machine=machine_info(device),
            versions=package_versions(),
            reference={"precision": self.tuned.precision, "random_score": floor},
            rows=rows,
        )
        return {**document, "gain": plain(self.gain(seed=seed))}
