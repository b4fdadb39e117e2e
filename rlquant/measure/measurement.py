"""One measured policy: its score, what it keeps, its size and its speed; and its row of results.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlquant.errors import InputError
from rlquant.measure.agreement import Agreement
from rlquant.measure.latency import Latency
from rlquant.measure.results import plain
from rlquant.measure.retention import Retention
from rlquant.measure.statistics import Interval, as_scores, iqm, mean_interval, std, worst_decile

__all__ = ["Measurement", "Score", "Size", "WeightHistogram", "weight_histogram"]


@dataclass(frozen=True)
class Score:
    """Scores of one policy; all in the unit of the return.

    Attributes:
        mean: over episodes. std: sample standard deviation (NaN for one episode). iqm: interquartile mean.
        worst_decile: mean of the worst tenth. ci: bootstrap interval of the mean (NaN for one episode).
        episodes: the score of each episode, in the order of the seeds.
    """

    mean: float
    std: float
    iqm: float
    worst_decile: float
    ci: Interval
    episodes: tuple[float, ...]

    @classmethod
    def from_episodes(
        cls, scores: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
    ) -> Score:
        """Summarise ``scores``, array [n].

        Raises:
            InputError: empty or non-finite scores.
        """
        array = as_scores(scores)
        return cls(
            mean=float(array.mean()),
            std=std(array),
            iqm=iqm(array),
            worst_decile=worst_decile(array),
            ci=mean_interval(array, confidence, resamples, seed),
            episodes=tuple(array.tolist()),
        )


@dataclass(frozen=True)
class Size:
    """Bytes: of the packed ``weights`` with scales, and of the ``artifact`` on disk (None if not written)."""

    weights: int
    artifact: int | None = None


@dataclass(frozen=True)
class WeightHistogram:
    """Distribution of one layer's weights before and after quantization, over common bins.

    Attributes:
        layer: name of the parameter. edges: bins + 1 bin edges. before, after: counts per bin.
        sqnr_db: signal to quantization noise ratio in decibels (infinite where nothing changed).
    """

    layer: str
    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    sqnr_db: float


def weight_histogram(
    layer: str, before: ArrayLike, after: ArrayLike, *, sqnr_db: float, bins: int = 61
) -> WeightHistogram:
    """Histogram of the weights ``before`` and ``after`` quantization, arrays of one shape.

    The bins are symmetric around zero, odd in number so that zero has its own.

    Raises:
        InputError: arrays that are empty, differ in shape or hold NaN or infinity.
    """
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.shape != new.shape or old.size == 0:
        raise InputError(
            f"weights of {layer} must have one non-empty shape, not {list(old.shape)} and {list(new.shape)}"
        )
    limit = max(float(np.abs(old).max()), float(np.abs(new).max()))
    if not np.isfinite(limit):
        raise InputError(f"weights of {layer} hold NaN or infinity")
    edges = np.linspace(-limit, limit, bins + 1) if limit > 0 else np.linspace(-1.0, 1.0, bins + 1)
    counts = [np.histogram(array, edges)[0].tolist() for array in (old, new)]
    return WeightHistogram(layer, tuple(edges.tolist()), tuple(counts[0]), tuple(counts[1]), sqnr_db)


@dataclass(frozen=True)
class Measurement:
    """Everything measured about one policy at one precision.

    Attributes:
        precision: scheme name, for example "w8a8".
        method: how it was quantized, for example "rtn"; "none" for the reference.
        runtime: what computed the actions, for example "torch".
        score: see :class:`Score`. retention: compared with the reference on the same episodes.
        bytes: see :class:`Size`. compression: reference weight bytes over these.
        agreement, latency: None where not measured. weights: a histogram per quantized layer.
        shifts: of closed-loop calibration, plain JSON per round: how far the inputs moved, by input and
            feature: ``mean`` and ``wasserstein`` in standard deviations, ``outside`` as a share.
        realtime: of play in real time, plain JSON per slowdown: latency, control rate, what was missed, score and
            retention against the reference in a world that waits.
    """

    precision: str
    method: str
    runtime: str
    score: Score
    retention: Retention
    bytes: Size
    compression: float
    agreement: Agreement | None = None
    latency: Latency | None = None
    weights: tuple[WeightHistogram, ...] = ()
    shifts: tuple[dict[str, Any], ...] = ()
    realtime: tuple[dict[str, Any], ...] = ()

    def to_row(self) -> dict[str, Any]:
        """The row of results.json: plain JSON types, null for what is undefined or was not measured."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["latency_us"] = fields.pop("latency")
        row: dict[str, Any] = plain(fields)
        return row
