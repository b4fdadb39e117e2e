"""Finds the cheapest mixed-precision scheme that keeps the reward.

1. *Sensitivity*: how far do the outputs move when one layer's weights alone have 8, 4, 3 or 2 bits?
2. *Ladder*: from 8 bits everywhere, the layer whose next step down saves the most bytes per added divergence
   goes down, until all have 2 bits (a greedy knapsack). Activations have 8 bits: they cost no bytes.
3. *Bisection and proof*: as :mod:`rlquant.measure.search` says. ``distill`` trains a student for each rung that it
   tries; proofs play episodes that nothing has seen, and each look at one has its share of the error, too.

The same seed gives the same answer; a deadline makes it depend on the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlquant.control.agent import Agent
from rlquant.control.audition import Audition
from rlquant.control.evaluate import Evaluation, random_score_of
from rlquant.control.input_bits import apply_scheme_
from rlquant.control.ladder import ladder
from rlquant.control.methods import parse_method
from rlquant.control.pieces import Memory, Pieces
from rlquant.control.profile import Profiler
from rlquant.control.quantize import float_twin
from rlquant.control.quantizer import Quantizer
from rlquant.control.rollout import EnvPool
from rlquant.control.runtimes import RuntimeChooser
from rlquant.control.sensitivity import sensitivities
from rlquant.control.settings import Settings, settings_json
from rlquant.measure import Goal, Outcome, Search, Sensitivity, Trial, proof_confidence
from rlquant.quant import MixedScheme, prepare_empty_, weight_bytes

__all__ = ["Tuned", "tune"]

_SENSITIVITY_EPISODES = 8


@dataclass(kw_only=True)
class Tuned(Outcome):
    """The outcome, and ``agent``: the one chosen."""

    agent: Agent


def tune(
    agent: Agent,
    goal: Goal,
    settings: Settings,
    *,
    methods: Sequence[str] = ("auto", "distill"),
    pieces: Pieces | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Find the cheapest scheme that reaches the goal.

    Args:
        agent: in fp32.
        goal: what has to hold.
        settings: episodes, seed and confidence of the proofs; its precisions, methods and margin do not matter.
        methods: that may be used; ``distill`` takes minutes for each rung that it tries.
        pieces: keeps finished pieces for a resumed run; by default in memory.
        progress: called with a sentence at each step.

    Raises:
        InputError: a bad goal or method, or an agent that is quantized already or has nothing to quantize.
    """
    for method in methods:
        parse_method(method)
    pool = EnvPool(agent.env)
    try:
        tell = progress or (lambda _sentence: None)
        candidates = _Candidates(agent, goal, settings, pool, pieces or Memory(), tell)
        sensitivity = candidates.sensitivity()
        sizes = {rung.name: candidates.bytes(rung) for rung in ladder(agent, sensitivity)}
        outcome = Search(goal, candidates, methods=methods, progress=tell).run(sizes)
        chosen = candidates.quantizer.quantize(
            MixedScheme.parse(outcome.chosen.scheme), outcome.chosen.method
        )
        return Tuned(**(vars(outcome) | {"sensitivity": sensitivity}), agent=chosen)
    finally:
        pool.close()


class _Candidates:
    """Quantized copies of one agent, for :class:`rlquant.measure.Search`."""

    kept, unit = "the reward", "audition episodes"

    def __init__(
        self,
        agent: Agent,
        goal: Goal,
        settings: Settings,
        pool: EnvPool,
        pieces: Pieces,
        progress: Callable[[str], None],
    ) -> None:
        self.agent, self.goal, self.pieces, self.progress = agent, goal, pieces, progress
        self.settings = replace(
            settings,
            margin=1 - goal.retain,
            confidence=proof_confidence(settings.confidence),
            sequential=True,
        )
        self.quantizer = Quantizer(
            agent,
            pool,
            seed=settings.seed,
            calibration_episodes=settings.calibration_episodes,
            closed_loop=settings.closed_loop,
            pieces=pieces,
        )
        random_score = random_score_of(agent.env, seed=settings.seed, pieces=pieces)
        self.auditions = Audition(agent, pool, random_score=random_score, seed=settings.seed, pieces=pieces)
        self._profiler: Profiler | None = None
        self._chooser = RuntimeChooser(
            agent, pool, seed=settings.seed, runtime=settings.runtime, device=settings.device
        )

    def sensitivity(self) -> list[Sensitivity]:
        """Of every tensor."""
        kept = self.pieces.piece("sensitivity")
        if kept is not None:
            return [Sensitivity(**each) for each in kept["tensors"]]
        self.progress("measuring the sensitivity of each tensor")
        found = sensitivities(
            self.quantizer,
            play=lambda quantized: (
                self.auditions.hear(
                    quantized, retain=self.goal.retain, stages=(_SENSITIVITY_EPISODES,)
                ).retention
            ),
        )
        self.pieces.save_piece("sensitivity", {"tensors": [asdict(each) for each in found]})
        return found

    def bytes(self, scheme: MixedScheme) -> int:
        """Exactly, without choosing any code."""
        actor = float_twin(self.agent, scheme, self.quantizer.inputs())
        apply_scheme_(
            actor, scheme, lambda module, base, schemes: prepare_empty_(module, base, schemes=schemes)
        )
        return weight_bytes(actor)

    def audition(self, scheme: str, method: str) -> Trial:
        """See :class:`rlquant.measure.Candidates`."""
        rung = MixedScheme.parse(scheme)
        parse_method(method).check(rung)
        quantized = self.quantizer.quantize(rung, method)
        heard = self.auditions.hear(quantized, retain=self.goal.retain)
        latency = self._latency(quantized) if self.goal.deadline is not None else None
        in_time = latency is None or latency <= (self.goal.deadline or math.inf)
        return Trial(
            rung.name,
            quantized.method,
            weight_bytes(quantized.actor),
            heard.retention,
            heard.episodes,
            heard.passed and in_time,
            latency,
        )

    def prove(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """See :class:`rlquant.measure.Candidates`."""
        rows = [(MixedScheme.parse("fp32"), "none")]
        rows += [(MixedScheme.parse(trial.scheme), trial.method) for trial in trials]
        settings = replace(
            self.settings,
            precisions=tuple(trial.scheme for trial in trials),
            methods=tuple(dict.fromkeys(trial.method for trial in trials)),
        )
        run = Evaluation(self.agent, settings, pieces=self.pieces, rows=rows, quantizer=self.quantizer)
        return {"settings": settings_json(settings), **run.run()}

    def _latency(self, quantized: Agent) -> float:
        if self._profiler is None:
            self._profiler = Profiler(
                self.agent,
                self.quantizer.pool,
                seed=self.settings.seed,
                episodes=1,
                device=self.settings.device,
            )
        runtime = self._chooser.choose(quantized).name
        return float(self._profiler.latency(quantized, runtime).p99) / 1e6
