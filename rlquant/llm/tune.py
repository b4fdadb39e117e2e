"""Finds the smallest mixed-precision plan that keeps a language model's lead over uniform guessing.

1. *Sensitivity* of every part (:mod:`~rlquant.llm.sensitivity`), by default at 8, 6, 5, 4, 3 and 2 bits.
2. *Ladder*: from the most bits everywhere the part whose next step down adds the least divergence a byte goes down,
   until none can (:func:`rlquant.quant.greedy_ladder`).
3. *Bisection and proof*, as :mod:`rlquant.measure.search` says. Auditions read windows of text that are drawn at
   random; proofs read the others, and calibration neither.

The score of a window is its negative mean loss, as in :mod:`~rlquant.llm.evaluate`. The same seed gives the
same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.errors import InputError
from rlquant.llm.evaluate import LanguageEvaluation, RowBlocks, Texts
from rlquant.llm.load import DTYPES
from rlquant.llm.model import LanguageModel, decoder_blocks
from rlquant.llm.parts import BITS, EMBEDDING, STEPS, Part, parts_of, plan_of
from rlquant.llm.sensitivity import PartSensitivity, language_sensitivities, other_bytes
from rlquant.llm.settings import LanguageSettings
from rlquant.llm.text import Windows, window_losses
from rlquant.llm.versions import at_precision
from rlquant.measure import Goal, Outcome, Search, Trial, audition, proof_confidence
from rlquant.quant import Scheme, Step, get_method, greedy_ladder, weight_bytes
from rlquant.runs import RunFolder

__all__ = ["TunedLanguage", "language_ladder", "split_windows", "tune_language"]

_STAGES = (8, 32)  # windows after which an audition may be decided
_FEWEST = 16  # windows that a search makes sense with
_LEAST = 5  # that an interval needs


@dataclass(kw_only=True)
class TunedLanguage(Outcome):
    """The outcome, and ``lm``: the model under the plan that was chosen."""

    lm: LanguageModel

    def forget_blocks(self, folder: RunFolder) -> None:
        """Remove the blocks of all that was tried; what was measured stays, for the same command again."""
        for trial in self.trials:
            RowBlocks(folder, f"{trial.scheme}-{trial.method}").drop(len(decoder_blocks(self.lm.model)))


def split_windows(
    windows: Windows, *, search: int, proof: int | None = None, seed: int = 0
) -> tuple[Windows, Windows]:
    """Windows to search with and windows to prove with, which share no token.

    Args:
        windows: of the text, that do not overlap.
        search: how many at most; never more than half of all.
        proof: how many of the others at most; None takes all.
        seed: of the choice.

    Raises:
        InputError: there are too few windows, or they overlap; or the search asks for hardly any.
    """
    count, length = windows.tokens.shape
    if search < _LEAST:
        raise InputError(f"--search-windows must be at least {_LEAST}, not {search}")
    if windows.stride < length:
        raise InputError("windows of a search must not overlap: proofs read what nothing has seen")
    if count < _FEWEST:
        raise InputError(
            f"the text makes {count} windows of {length} tokens, and a search needs at least {_FEWEST}: give more "
            "text, or a shorter --window"
        )
    found, others = windows.parted(min(search, count // 2), seed)
    return found, others if proof is None else others.first(proof)


def tune_language(
    lm: LanguageModel,
    goal: Goal,
    settings: LanguageSettings,
    texts: Texts,
    search: Windows,
    *,
    folder: RunFolder,
    bits: Sequence[int] = BITS,
    progress: Callable[[str], None] = lambda _sentence: None,
) -> TunedLanguage:
    """Find the smallest plan that reaches the goal.

    Args:
        lm: in a float dtype, on the device of the settings; unchanged afterwards.
        goal: what has to hold; it has no deadline.
        settings: methods, confidence, seed and device; precisions and margin follow from the search.
        texts: windows of the proofs, and calibration.
        search: windows of sensitivities and auditions; see :func:`split_windows`.
        folder: keeps finished pieces for a resumed run.
        bits: that parts of blocks may have, keys of ``STEPS``.
        progress: called with a sentence at each step.

    Raises:
        InputError: bits that no scheme has; the model is quantized already, or there is no calibration; a method is
            unknown, or cannot do a scheme that it is to be tried with.
    """
    if lm.precision not in DTYPES:
        raise InputError(f"{lm.source} is quantized to {lm.precision} already; tune the float model")
    if texts.calibration is None:
        raise InputError("sensitivities are measured with GPTQ, which reads text: give calibration windows")
    unknown = [count for count in bits if count not in STEPS]
    if unknown:
        raise InputError(f"--widths are some of {', '.join(map(str, STEPS))} bits, not {unknown[0]}")
    for method in settings.methods:
        for count in bits:
            get_method(method).check(Scheme.parse(STEPS[count]))
    sensitivity = language_sensitivities(
        lm, search, texts.calibration, folder=folder, bits=bits, progress=progress
    )
    sizes = language_ladder(lm, sensitivity)
    candidates = _Candidates(lm, goal, settings, texts, search, folder)
    outcome = Search(goal, candidates, methods=settings.methods, progress=progress).run(sizes)
    chosen = candidates.quantized(outcome.chosen.scheme, outcome.chosen.method)
    return TunedLanguage(**(vars(outcome) | {"sensitivity": sensitivity}), lm=chosen)


def language_ladder(lm: LanguageModel, found: Sequence[PartSensitivity]) -> dict[str, int]:
    """Plans from 8 bits everywhere down, by name, each one part's step below the last, and the bytes that they take.

    Args:
        lm: the float model.
        found: its sensitivities.
    """
    own: dict[str, list[PartSensitivity]] = {}
    for each in sorted(found, key=lambda each: -each.bits):
        steps = own.setdefault(each.layer, [])
        if not steps or each.bytes < steps[-1].bytes:  # scales of a narrow layer may outweigh a bit
            steps.append(each)
    parts = {part.name: part for part in parts_of(lm.model)}
    rest = other_bytes(lm) - sum(_float_bytes(lm, part) for part in parts.values())
    sizes: dict[str, int] = {}
    costs = {name: [Step(step.bytes, step.divergence) for step in steps] for name, steps in own.items()}
    for rung in greedy_ladder(costs):
        steps_now = {name: own[name][index] for name, index in rung.items()}
        table = steps_now.pop(EMBEDDING)
        plan = plan_of({parts[name]: step.scheme for name, step in steps_now.items()}, table.scheme, "rtn")
        sizes[plan.name] = rest + table.bytes + sum(step.bytes for step in steps_now.values())
    return sizes


def _float_bytes(lm: LanguageModel, part: Part) -> int:
    block = decoder_blocks(lm.model)[part.block]
    return sum(weight_bytes(block.get_submodule(name)) for name in part.names)


class _Candidates:
    """Quantized copies of one language model, for :class:`rlquant.measure.Search`."""

    kept, unit = "the lead over uniform guessing", "audition windows"

    def __init__(
        self,
        lm: LanguageModel,
        goal: Goal,
        settings: LanguageSettings,
        texts: Texts,
        search: Windows,
        folder: RunFolder,
    ) -> None:
        self.lm, self.goal, self.texts, self.search, self.folder = lm, goal, texts, search, folder
        self.settings = replace(
            settings,
            margin=1 - goal.retain,
            confidence=proof_confidence(settings.confidence),
            generate=(),
        )
        self._made: tuple[tuple[str, str], LanguageModel] | None = None

    def quantized(self, scheme: str, method: str) -> LanguageModel:
        """The model under a plan; the last one asked for is at hand."""
        if self._made is None or self._made[0] != (scheme, method):
            self._made = None  # before another is made: two take the memory of two
            made = at_precision(
                self.lm,
                scheme,
                method,
                calibration=self.texts.calibration,
                store=self._blocks(scheme, method),
            )
            self._made = (scheme, method), made
        return self._made[1]

    def audition(self, scheme: str, method: str) -> Trial:
        """See :class:`rlquant.measure.Candidates`."""
        available = len(self.search.tokens)
        stages = sorted({min(stage, available) for stage in (*_STAGES, available)})
        name = f"audition-{scheme}-{method}"
        heard = audition(
            lambda count: (
                -self._losses("audition-reference", count, lambda: self.lm),
                -self._losses(name, count, lambda: self.quantized(scheme, method)),
            ),
            random_score=-math.log(self.lm.vocabulary),
            retain=self.goal.retain,
            stages=stages,
        )
        size = (self.folder.piece(name) or {})["bytes"]
        if not heard.passed:
            self._blocks(scheme, method).drop(len(decoder_blocks(self.lm.model)))
        return Trial(scheme, method, size, heard.retention, heard.episodes, heard.passed)

    def prove(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """See :class:`rlquant.measure.Candidates`."""
        rows = [(self.lm.precision, "none"), *((trial.scheme, trial.method) for trial in trials)]
        self._made = None
        settings = replace(self.settings, precisions=tuple(precision for precision, _ in rows))
        run = LanguageEvaluation(self.lm, settings, self.texts, folder=self.folder, rows=rows)
        return {"settings": settings.to_json(), **run.run()}

    def _blocks(self, scheme: str, method: str) -> RowBlocks:
        return RowBlocks(self.folder, f"{scheme}-{method}")  # as an evaluation's rows are called

    def _losses(self, name: str, count: int, make: Callable[[], LanguageModel]) -> NDArray[np.float64]:
        """Losses of the first ``count`` windows; what was read once is kept, with the bytes of the model."""
        kept = self.folder.piece(name) or {"losses": [], "bytes": 0}
        losses: list[float] = kept["losses"]
        if len(losses) < count:
            lm = make()
            more = Windows(self.search.tokens[len(losses) : count], self.search.stride)
            losses = [*losses, *window_losses(lm, more).tolist()]
            self.folder.save_piece(name, {"losses": losses, "bytes": weight_bytes(lm.model)})
        return np.asarray(losses[:count])
