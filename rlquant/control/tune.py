"""Finds the cheapest mixed-precision scheme that keeps the reward.

1. *Sensitivity*: how far do the outputs move when one layer's weights alone have 8, 4, 3 or 2 bits?
2. *Ladder*: from 8 bits everywhere, the layer whose next step down saves the most bytes per added divergence
   goes down, until all have 2 bits (a greedy knapsack). Activations have 8 bits: they cost no bytes.
3. *Bisection*: for each method the cheapest rung that passes an audition (:mod:`~rlquant.control.audition`), as
   if whatever is dearer passed too. ``distill`` trains a student for each rung that it tries.
4. *Proof*: those that passed are evaluated, the cheapest first, on episodes that nothing has seen, until one
   is retained. Each of up to ``PROOFS`` proofs has its share of the error (Bonferroni), and so has each look.

The same seed gives the same answer; a deadline makes it depend on the clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from rlquant.control.agent import Agent
from rlquant.control.audition import Audition
from rlquant.control.evaluate import Evaluation, random_score_of
from rlquant.control.goal import Goal, Trial, Tuned
from rlquant.control.input_bits import apply_scheme_
from rlquant.control.ladder import ladder
from rlquant.control.methods import parse_method
from rlquant.control.pieces import Memory, Pieces
from rlquant.control.profile import Profiler
from rlquant.control.quantize import float_twin
from rlquant.control.quantizer import Quantizer
from rlquant.control.rollout import EnvPool
from rlquant.control.runtimes import RuntimeChooser
from rlquant.control.sensitivity import Sensitivity, sensitivities
from rlquant.control.settings import Settings, settings_json
from rlquant.quant import MixedScheme, prepare_empty_, weight_bytes

__all__ = ["PROOFS", "tune"]

PROOFS = 4

_SENSITIVITY_EPISODES = 8
_SPACING = 0.97  # rungs that save less than this share of the bytes are not worth an audition


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
        return _Search(agent, goal, settings, pool, tuple(methods), pieces or Memory(), progress).run()
    finally:
        pool.close()


class _Search:
    """One search, step by step."""

    def __init__(
        self,
        agent: Agent,
        goal: Goal,
        settings: Settings,
        pool: EnvPool,
        methods: tuple[str, ...],
        pieces: Pieces,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.agent, self.goal, self.methods, self.pieces = agent, goal, methods, pieces
        self.settings = replace(
            settings,
            margin=1 - goal.retain,
            confidence=1 - (1 - settings.confidence) / PROOFS,
            sequential=True,
        )
        self.progress = progress or (lambda _sentence: None)
        self.quantizer = Quantizer(
            agent,
            pool,
            seed=settings.seed,
            calibration_episodes=settings.calibration_episodes,
            closed_loop=settings.closed_loop,
            pieces=pieces,
        )
        random_score = random_score_of(agent.env, seed=settings.seed, pieces=pieces)
        self.audition = Audition(agent, pool, random_score=random_score, seed=settings.seed, pieces=pieces)
        self.trials: dict[tuple[str, str], Trial] = {}
        self.reasons: list[str] = []
        self._profiler: Profiler | None = None
        self._chooser = RuntimeChooser(
            agent, pool, seed=settings.seed, runtime=settings.runtime, device=settings.device
        )

    def run(self) -> Tuned:
        sensitivity = self._sensitivity()
        rungs = self._affordable(ladder(self.agent, sensitivity))
        self._climb(rungs)
        proved, results = self._prove()
        agent = self._agent(proved)
        held = self._judge(proved, results)
        return Tuned(agent, held, results, list(self.trials.values()), sensitivity, self.reasons)

    def _sensitivity(self) -> list[Sensitivity]:
        kept = self.pieces.piece("sensitivity")
        if kept is not None:
            return [Sensitivity(**each) for each in kept["tensors"]]
        self.progress("measuring the sensitivity of each tensor")
        found = sensitivities(
            self.quantizer,
            play=lambda quantized: (
                self.audition.hear(
                    quantized, retain=self.goal.retain, stages=(_SENSITIVITY_EPISODES,)
                ).retention
            ),
        )
        self.pieces.save_piece("sensitivity", {"tensors": [asdict(each) for each in found]})
        return found

    def _affordable(self, rungs: list[MixedScheme]) -> list[MixedScheme]:
        """Rungs that fit into memory, the cheapest first, less those that hardly differ in bytes."""
        sizes = {rung: self._bytes(rung) for rung in rungs}
        kept: list[MixedScheme] = []
        for rung in sorted(rungs, key=sizes.__getitem__):
            if not kept or sizes[kept[-1]] <= _SPACING * sizes[rung]:
                kept.append(rung)
        limit = self.goal.memory
        if limit is None:
            return kept
        fitting = [rung for rung in kept if sizes[rung] <= limit]
        if not fitting:
            self._say(
                f"even {kept[0].name} takes {sizes[kept[0]]:,} bytes, {sizes[kept[0]] - limit:,} too many"
            )
        elif len(fitting) < len(kept):
            self._say(f"{len(kept) - len(fitting)} of {len(kept)} schemes do not fit into {limit:,} bytes")
        return fitting or kept[:1]

    def _bytes(self, scheme: MixedScheme) -> int:
        """Exactly, without choosing any code."""
        actor = float_twin(self.agent, scheme, self.quantizer.inputs())
        apply_scheme_(
            actor, scheme, lambda module, base, schemes: prepare_empty_(module, base, schemes=schemes)
        )
        return weight_bytes(actor)

    def _climb(self, rungs: list[MixedScheme]) -> None:
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

    def _try(self, rung: MixedScheme, method: str) -> Trial:
        able = parse_method(method)
        able.check(rung)
        self.progress(f"trying {rung.name} by {method}")
        quantized = self.quantizer.quantize(rung, method)
        heard = self.audition.hear(quantized, retain=self.goal.retain)
        latency = self._latency(quantized) if self.goal.deadline is not None else None
        in_time = latency is None or latency <= (self.goal.deadline or math.inf)
        trial = Trial(
            rung.name,
            quantized.method,
            weight_bytes(quantized.actor),
            heard.retention,
            heard.episodes,
            heard.passed and in_time,
            latency,
        )
        self.trials[rung.name, quantized.method] = trial
        late = "" if in_time or latency is None else f", but takes {1e6 * latency:.0f} us"
        verb = "passes" if trial.passed else "fails"
        self._say(
            f"{rung.name} by {trial.method} ({trial.bytes:,} bytes) {verb}: it keeps {100 * heard.retention:.1f}% "
            f"over {heard.episodes} audition episodes{late}"
        )
        return trial

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

    def _prove(self) -> tuple[Trial, dict[str, Any]]:
        """Evaluate candidates, the cheapest first, until one is retained; the best of them, and all results."""
        ordered = sorted(self.trials.values(), key=lambda trial: trial.bytes)
        passing = [trial for trial in ordered if trial.passed][:PROOFS]
        candidates = passing or [max(ordered, key=lambda trial: trial.retention)]
        proved: list[Trial] = []
        results: dict[str, Any] = {}
        for trial in candidates:
            proved.append(trial)
            self.progress(f"proving {trial.scheme} by {trial.method}")
            results = self._evaluate(proved)
            verdict = results["rows"][-1]["retention"]
            if verdict["verdict"] == "retained":
                return trial, results
            self._say(f"{trial.scheme} by {trial.method} is not proved: {verdict['reason']}")
        values = [row["retention"]["value"] or -math.inf for row in results["rows"][1:]]
        return proved[values.index(max(values))], results

    def _evaluate(self, proved: list[Trial]) -> dict[str, Any]:
        rows = [(MixedScheme.parse("fp32"), "none")]
        rows += [(MixedScheme.parse(trial.scheme), trial.method) for trial in proved]
        settings = replace(
            self.settings,
            precisions=tuple(trial.scheme for trial in proved),
            methods=tuple(dict.fromkeys(trial.method for trial in proved)),
        )
        run = Evaluation(self.agent, settings, pieces=self.pieces, rows=rows, quantizer=self.quantizer)
        return {"settings": settings_json(settings), **run.run()}

    def _judge(self, proved: Trial, results: dict[str, Any]) -> bool:
        """Whether the goal holds; says so, or by how much it is missed."""
        index = next(
            i
            for i, row in enumerate(results["rows"])
            if (row["precision"], row["method"]) == (proved.scheme, proved.method)
        )
        reference, row = results["rows"][0], results["rows"][index]
        retention, goal = row["retention"], self.goal
        smaller = (
            f"{proved.bytes:,} bytes, {reference['bytes']['weights'] / proved.bytes:.1f}x smaller than fp32"
        )
        misses = []
        if retention["verdict"] != "retained":
            value = retention["value"]
            short = f"by {100 * (goal.retain - value):.1f} points" if value is not None else "(undefined)"
            missed = value is None or value < goal.retain
            misses.append(
                f"the reward {short}" if missed else "the proof: the interval reaches below the goal"
            )
        if goal.memory is not None and proved.bytes > goal.memory:
            misses.append(f"the memory by {proved.bytes - goal.memory:,} bytes")
        if goal.deadline is not None and proved.latency is not None and proved.latency > goal.deadline:
            misses.append(f"the deadline by {1e6 * (proved.latency - goal.deadline):.0f} us")
        name = f"{proved.scheme} by {proved.method} ({smaller})"
        if misses:
            self._say(f"no scheme reaches the goal; the best found, {name}, misses {' and '.join(misses)}")
        else:
            self._say(f"{name} is the cheapest that is proved: {retention['reason']}")
        return not misses

    def _agent(self, trial: Trial) -> Agent:
        return self.quantizer.quantize(MixedScheme.parse(trial.scheme), trial.method)

    def _say(self, sentence: str) -> None:
        self.reasons.append(sentence)
        self.progress(sentence)
