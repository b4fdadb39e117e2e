"""The main job: how much of its reward does an agent keep at each precision?

Every precision plays the same episodes as fp32. Scores go through the paired statistics of
``rlquant.measure``; this file only says what is run, in which order, and what is kept for a resumed run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlquant import catalog
from rlquant.control.agent import Agent
from rlquant.control.collect import raw_observations
from rlquant.control.environment import EnvSpec, random_scores
from rlquant.control.methods import AUTO, parse_method
from rlquant.control.pieces import Memory, Pieces
from rlquant.control.profile import Profiler
from rlquant.control.program_session import actor_in
from rlquant.control.quantizer import Quantizer
from rlquant.control.realtime import (
    Coupling,
    check_realtime,
    control_rate,
    latencies_of,
    measured_latencies,
    realtime_json,
)
from rlquant.control.rollout import EnvPool, rollout
from rlquant.control.row import Row
from rlquant.control.runtimes import RuntimeChooser, is_simulated, tell_passed_over
from rlquant.control.settings import LOOKS, RealTimeSettings, Settings
from rlquant.errors import InputError
from rlquant.measure import Measurement, Retention, Score, Size, compare
from rlquant.quant import MixedScheme

__all__ = ["LATENCIES", "Evaluation", "evaluate", "random_score_of", "subject"]

LATENCIES = "latencies"
"""The piece that keeps the measured latencies of a run in real time: microseconds by row."""

_RANDOM_EPISODES = 100
_CHUNK = 256  # episodes between two saves of a long row


Progress = Callable[[str, int, int], None]


class Evaluation:
    """One evaluation of one agent.

    Args:
        agent: in fp32, the reference.
        settings: what to run.
        artifact: a quantized agent made from it earlier, to be evaluated as it is.
        pieces: keeps finished pieces for a resumed run; None keeps nothing.
        rows: (scheme, method) of each row, fp32 first; by default those of the settings.
        quantizer: what quantizes the agent, on its own environments; by default a new one.
        workers, batch: processes, and episodes that step together; neither changes a score.
        progress: called with (row name, episodes done, episodes wanted).
    """

    def __init__(
        self,
        agent: Agent,
        settings: Settings,
        *,
        artifact: Agent | None = None,
        pieces: Pieces | None = None,
        rows: Sequence[tuple[MixedScheme, str]] | None = None,
        quantizer: Quantizer | None = None,
        workers: int = 1,
        batch: int = 128,
        progress: Progress | None = None,
    ) -> None:
        if agent.precision != "fp32":
            raise InputError(
                f"{agent.source} is quantized to {agent.precision}; the reference must be in fp32"
            )
        if settings.realtime is not None:
            check_realtime(agent)
            self._rate_hz = control_rate(agent.env, settings.realtime.control_rate_hz)
        self.agent = agent
        self.artifact = artifact
        self.settings = settings
        self.pieces = pieces or Memory()
        self.workers, self.batch = workers, batch
        self.progress = progress or (lambda _name, _done, _wanted: None)
        self.chosen_rows = rows
        self._owns_pool = quantizer is None
        self.quantizer = quantizer or Quantizer(
            agent,
            EnvPool(agent.env),
            seed=settings.seed,
            calibration_episodes=settings.calibration_episodes,
            closed_loop=settings.closed_loop,
            pieces=self.pieces,
        )
        self.pool = self.quantizer.pool

    def run(self) -> dict[str, Any]:
        """Evaluate every row; the ``reference`` and ``rows`` of a results document."""
        try:
            random_score = random_score_of(self.agent.env, seed=self.settings.seed, pieces=self.pieces)
            rows = self._rows()
            if self.settings.realtime is not None:
                self._couple(rows, self.settings.realtime)
            for row in rows:
                for each in (row, *row.realtime):
                    self._play(each, self.settings.episodes)
            if self.settings.sequential:
                self._play_until_decided(rows, random_score)
            self._measure(rows)
        finally:
            if self._owns_pool:
                self.pool.close()
        measured = [self._measurement(row, rows[0], random_score) for row in rows]
        reference = {"precision": "fp32", "random_score": random_score}
        return {"reference": reference, "rows": [measurement.to_row() for measurement in measured]}

    def _rows(self) -> list[Row]:
        """fp32 first; what an interrupted run has kept is filled in."""
        rows = [
            Row(scheme, method, self._quantized(scheme, method))
            for scheme, method in self.chosen_rows or self.settings.schemes()
        ]
        if self.artifact is not None:
            scheme = MixedScheme.parse(self.artifact.precision)
            rows.append(Row(scheme, self.artifact.method, self.artifact, artifact=True))
        for row in rows:
            row.resume(self.pieces)
        self._choose_runtimes([row for row in rows if not row.runtime])
        return rows

    def _choose_runtimes(self, rows: list[Row]) -> None:
        """What an interrupted run has begun goes on in the runtime that it began in."""
        settings = self.settings
        chooser = RuntimeChooser(
            self.agent, self.pool, seed=settings.seed, runtime=settings.runtime, device=settings.device
        )
        choices = [chooser.choose(row.agent) for row in rows]
        for row, choice in zip(rows, choices, strict=True):
            row.runtime = choice.name
        tell_passed_over((row.scheme.name, choice) for row, choice in zip(rows, choices, strict=True))

    def _couple(self, rows: list[Row], realtime: RealTimeSettings) -> None:
        """The rows that play in real time, with what their actions take."""
        latencies = latencies_of([row.name for row in rows], realtime.latencies_us) or self._latencies(rows)
        for row in rows:
            simulated = realtime.latencies_us is None and is_simulated(row.agent, row.runtime)
            for slowdown in dict.fromkeys(realtime.slowdowns):
                coupling = Coupling(tuple(latencies[row.name]), slowdown, self._rate_hz, simulated)
                coupled = Row(row.scheme, row.method, row.agent, row.artifact, row.runtime, coupling=coupling)
                coupled.resume(self.pieces)
                row.realtime.append(coupled)

    def _latencies(self, rows: list[Row]) -> dict[str, list[float]]:
        """Measured once, so that a resumed run replays the same."""
        kept = self.pieces.piece(LATENCIES)
        if kept is None:
            acts = {row.name: actor_in(row.agent, row.runtime, self.settings.device) for row in rows}
            observations = raw_observations(self.agent, seed=self.settings.seed, pool=self.pool)
            kept = measured_latencies(acts, observations)
            self.pieces.save_piece(LATENCIES, kept)
        return kept

    def _quantized(self, scheme: MixedScheme, method: str) -> Agent:
        self.progress(f"{scheme.name}-{method}", 0, self.settings.episodes)
        return self.quantizer.quantize(scheme, method)

    def _play(self, row: Row, wanted: int) -> None:
        """Bring a row to ``wanted`` episodes, keeping what is done after each chunk."""
        while len(row.returns) < wanted:
            done = len(row.returns)
            self.progress(row.name, done, wanted)
            played = rollout(
                row.agent,
                range(done, min(done + _CHUNK, wanted)),
                seed=self.settings.seed,
                pool=self.pool,
                batch=self.batch,
                workers=self.workers,
                device=self.settings.device,
                runtime=row.runtime,
                coupling=row.coupling,
            )
            row.returns += played.returns.tolist()
            if row.coupling is not None:
                row.profile["timing"] = row.profile.get("timing", []) + played.timing.tolist()
            self._keep_row(row)
        self.progress(row.name, wanted, wanted)

    def _play_until_decided(self, rows: list[Row], random_score: float) -> None:
        """Extend undecided rows (and the reference), up to ``LOOKS`` looks in all.

        Each look judges as many episodes as the look before planned, whatever an interrupted run has kept
        beyond them, so that a resumed run takes the same looks as an undisturbed one.
        """
        planned = {row.name: self.settings.episodes for row in rows}
        for _ in range(LOOKS - 1):
            more = {}
            for row in rows[1:]:
                seen = self._retention(row, rows[0], random_score, planned[row.name])
                if seen.verdict == "undecided" and seen.more_episodes:
                    more[row.name] = min(planned[row.name] + seen.more_episodes, self.settings.max_episodes)
            more = {name: length for name, length in more.items() if length > planned[name]}
            if not more:
                return
            planned |= more
            self._play(rows[0], max(more.values()))
            for row in rows[1:]:
                self._play(row, planned[row.name])

    def _measure(self, rows: list[Row]) -> None:
        """Fill the profiles that are not there yet."""
        missing = [row for row in rows if not row.profile]
        if not missing:
            return
        settings = self.settings
        profiler = Profiler(
            self.agent,
            self.pool,
            seed=settings.seed,
            episodes=settings.episodes,
            device=settings.device,
        )
        for row in missing:
            row.profile = profiler.profile(row.agent, row.runtime)
            loop = self.quantizer.loops.get((row.scheme.name, row.agent.method))
            if loop is not None and not row.artifact:
                row.profile["shifts"] = [shift.to_json() for shift in loop.shifts]
            # Neither an artifact nor a student says which float network it was rounded from.
            parsed = None if row.artifact or row.scheme.is_identity else parse_method(row.agent.method)
            if parsed is not None and not parsed.trains:
                calibration = self.quantizer.calibration(row.scheme, row.agent.method)
                row.profile["weights"] = profiler.histograms(
                    row.agent, row.scheme, calibration, center=parsed.center
                )
            self._keep_row(row)

    def _retention(
        self, row: Row, reference: Row, random_score: float, episodes: int | None = None
    ) -> Retention:
        """Of the first ``episodes`` episodes; of all by default."""
        if row is reference:
            return Retention.of_reference()
        count = episodes or len(row.returns)
        return compare(
            np.asarray(reference.returns[:count]),
            np.asarray(row.returns[:count]),
            random_score=random_score,
            margin=self.settings.margin,
            confidence=self.settings.interval_confidence,
            seed=self.settings.seed,
        )

    def _measurement(self, row: Row, reference: Row, random_score: float) -> Measurement:
        settings, profile = self.settings, row.profile
        return Measurement(
            precision=row.scheme.name,
            method=f"auto={row.agent.method}" if row.method == AUTO else row.method,
            runtime=row.runtime,
            score=Score.from_episodes(row.returns, confidence=settings.confidence, seed=settings.seed),
            retention=self._retention(row, reference, random_score),
            bytes=Size(profile["weights_bytes"], profile["artifact_bytes"]),
            compression=reference.profile["weights_bytes"] / profile["weights_bytes"],
            agreement=profile["agreement"],
            latency=profile["latency_us"],
            weights=profile["weights"],
            shifts=tuple(profile.get("shifts", ())),
            realtime=tuple(self._in_real_time(each, reference, random_score) for each in row.realtime),
        )

    def _in_real_time(self, row: Row, reference: Row, random_score: float) -> dict[str, Any]:
        """Compared with the reference in a world that waits."""
        assert row.coupling is not None
        settings = self.settings
        return realtime_json(
            row.coupling,
            np.asarray(row.profile["timing"]),
            score=Score.from_episodes(row.returns, confidence=settings.confidence, seed=settings.seed),
            retention=self._retention(row, reference, random_score, len(row.returns)),
        )

    def _keep_row(self, row: Row) -> None:
        kept = {"returns": row.returns, "profile": row.profile, "runtime": row.runtime}
        self.pieces.save_piece(row.name, kept)


def random_score_of(env: EnvSpec, *, seed: int, pieces: Pieces) -> float:
    """Mean return of random actions: what the environment's card says, or measured once."""
    card = catalog.env_card(env.id) or {}
    if card.get("random_score") and card["make"]["kwargs"] == env.kwargs:
        return float(card["random_score"]["mean"])
    kept = pieces.piece("random")
    if kept is None:
        kept = {"mean": float(random_scores(env, _RANDOM_EPISODES, seed).mean())}
        pieces.save_piece("random", kept)
    return float(kept["mean"])


def evaluate(
    agent: Agent, precisions: Sequence[str] = ("fp32", "int8", "w8a8"), **settings: Any
) -> dict[str, Any]:
    """Evaluate an agent at each precision; the Python twin of ``rlquant evaluate``.

    Args:
        agent: from :func:`rlquant.control.load`, :meth:`Agent.from_module` or :func:`rlquant.control.from_sb3`.
        precisions: scheme names.
        **settings: further fields of :class:`Settings`.

    Returns:
        ``{"reference": {...}, "rows": [...]}`` as in results.json.
    """
    return Evaluation(agent, Settings(precisions=tuple(precisions), **settings)).run()


def subject(agent: Agent) -> dict[str, Any]:
    """The ``subject`` of a results document."""
    return {
        "source": agent.source,
        "kind": "control",
        "algorithm": agent.algorithm,
        "env": agent.env.id,
        "parameters": agent.parameters,
        "sha256": agent.sha256,
    }
