"""Evaluation of a language model at several precisions: what ``rlquant evaluate`` does for one.

The score of a window of text is its negative mean loss in nats a token. What a precision keeps is its lead over
uniform guessing, compared with the reference's on the same windows by the paired test that control policies go
through as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from rlquant.llm.data import Pair
from rlquant.llm.load import DTYPES
from rlquant.llm.model import LanguageModel
from rlquant.llm.preferences import preference_accuracy
from rlquant.llm.settings import KV, LanguageSettings
from rlquant.llm.speed import Generation, time_generation
from rlquant.llm.text import Windows, compare_windows, window_losses
from rlquant.llm.versions import accelerate_, at_precision
from rlquant.measure import Agreement, Measurement, Retention, Score, Size, compare, plain
from rlquant.quant import weight_bytes
from rlquant.runs import RunFolder

__all__ = ["LanguageEvaluation", "RowBlocks", "Texts", "generation_json", "subject"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Texts:
    """What is read.

    Attributes:
        windows: of the text that scores.
        calibration: int64 ``[windows, length]`` of other text; None where no method needs it.
        pairs: preference pairs, may be empty.
    """

    windows: Windows
    calibration: Tensor | None = None
    pairs: Sequence[Pair] = ()

    @property
    def sha256(self) -> str:
        """Of all of it, in hexadecimal: files of one name may hold different texts."""
        digest = hashlib.sha256(self.windows.tokens.tobytes())
        if self.calibration is not None:
            digest.update(self.calibration.numpy().tobytes())
        digest.update(repr([asdict(pair) for pair in self.pairs]).encode())
        return digest.hexdigest()


@dataclass
class _Row:
    precision: str
    method: str
    losses: list[float] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.precision}-{self.method}"

    @property
    def weights(self) -> str:
        """The precision of the weights alone."""
        return self.precision.partition(KV)[0]

    def cache(self, lm: LanguageModel) -> Callable[[], Any] | None:
        """What makes the KV cache that the row reads through; None where it reads without one."""
        scheme = self.precision.partition(KV)[2]
        if not scheme:
            return None
        from rlquant.llm.kv_cache import QuantizedCache

        return lambda: QuantizedCache(lm.model.config, scheme)


class LanguageEvaluation:
    """One evaluation of one language model.

    Args:
        lm: the reference, in its float dtype, on the device of the settings.
        settings: what to run.
        texts: what to read.
        folder: keeps finished rows, and finished blocks of rows, for a resumed run.
        progress: called with (row name, done, wanted).
        rows: (precision, method) of each row, the reference first; by default those of the settings.
    """

    def __init__(
        self,
        lm: LanguageModel,
        settings: LanguageSettings,
        texts: Texts,
        *,
        folder: RunFolder,
        progress: Progress = lambda _name, _done, _wanted: None,
        rows: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        self.pairs = settings.rows() if rows is None else rows
        self.lm, self.settings, self.texts = lm, settings, texts
        self.folder, self.progress = folder, progress

    def run(self) -> dict[str, Any]:
        """Evaluate every row; the ``reference`` and ``rows`` of a results document."""
        rows = [self._measured(_Row(*pair)) for pair in self.pairs]
        random_score = -math.log(self.lm.vocabulary)
        measured = [self._measurement(row, rows[0], random_score).to_row() for row in rows]
        for row, entry in zip(rows, measured, strict=True):
            entry["language"] = row.profile["language"] | {"perplexity": math.exp(float(np.mean(row.losses)))}
        return {
            "reference": {"precision": self.settings.reference, "random_score": random_score},
            "rows": measured,
        }

    def _measured(self, row: _Row) -> _Row:
        kept = self.folder.piece(row.name)
        if kept is None:
            windows = self.texts.windows
            wanted = len(windows.tokens)
            self.progress(row.name, 0, wanted)
            lm = at_precision(
                self.lm,
                row.weights,
                row.method,
                calibration=self.texts.calibration,
                store=RowBlocks(self.folder, row.name),
            )
            size = weight_bytes(lm.model)
            runtime = accelerate_(lm, self.settings.reference, row.weights)
            losses = window_losses(
                lm, windows, cache=row.cache(lm), done=lambda done: self.progress(row.name, done, wanted)
            )
            profile = {"bytes": size, "runtime": runtime, **self._profile(row, lm, runtime)}
            kept = {"losses": losses.tolist(), "profile": plain(profile)}
            self.folder.save_piece(row.name, kept)
        row.losses, row.profile = kept["losses"], kept["profile"]
        return row

    def _profile(self, row: _Row, lm: LanguageModel, runtime: str) -> dict[str, Any]:
        """What is measured besides the losses."""
        settings, windows = self.settings, self.texts.windows
        some = windows.first(settings.agreement_windows)
        cache = row.cache(lm)
        is_reference = lm is self.lm and cache is None
        agreement = None if is_reference else compare_windows(self.lm, lm, some, cache=cache)
        prompt = windows.tokens.ravel()[: settings.prompt_tokens].tolist()
        simulated = row.weights not in DTYPES and runtime == "torch"
        generation = [
            time_generation(
                lm,
                prompt,
                batch=batch,
                tokens=settings.new_tokens,
                simulated=simulated,
                cache=cache,
            )
            for batch in settings.generate
        ]
        language: dict[str, Any] = {
            "agreement": None if agreement is None else asdict(agreement),
            "generation": [generation_json(each) for each in generation],
            "preferences": None,
        }
        if self.texts.pairs:
            language["preferences"] = asdict(preference_accuracy(lm, self.texts.pairs))
        latency = next((each.step for each in generation if each.batch == 1), None)
        return {"latency": latency, "language": language}

    def _measurement(self, row: _Row, reference: _Row, random_score: float) -> Measurement:
        scores, settings = -np.asarray(row.losses), self.settings
        if row is reference:
            retention = Retention.of_reference()
        else:
            retention = compare(
                -np.asarray(reference.losses),
                scores,
                random_score=random_score,
                margin=settings.margin,
                confidence=settings.confidence,
                seed=settings.seed,
            )
        same = row.profile["language"]["agreement"]
        return Measurement(
            precision=row.precision,
            method=row.method,
            runtime=row.profile["runtime"],
            score=Score.from_episodes(scores, confidence=settings.confidence, seed=settings.seed),
            retention=retention,
            bytes=Size(row.profile["bytes"]),
            compression=reference.profile["bytes"] / row.profile["bytes"],
            agreement=None if same is None else Agreement(action=same["top1"], max_abs=None),
            latency=row.profile["latency"],
        )


class RowBlocks:
    """Finished blocks of one row (``precision-method``) in a run folder."""

    def __init__(self, folder: RunFolder, row: str) -> None:
        self.folder, self.row = folder, row

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """See :class:`~rlquant.llm.quantize.BlockStore`."""
        return self.folder.tensors(f"{self.row}-{name}")

    def save_tensors(self, name: str, tensors: Any) -> None:
        """See :class:`~rlquant.llm.quantize.BlockStore`."""
        self.folder.save_tensors(f"{self.row}-{name}", tensors)

    def drop(self, blocks: int) -> None:
        """Remove them."""
        for index in range(blocks):
            self.folder.drop_tensors(f"{self.row}-block-{index}")


def generation_json(generation: Generation) -> dict[str, Any]:
    """Plain JSON."""
    return {**asdict(generation), "step": asdict(generation.step)}


def subject(lm: LanguageModel) -> dict[str, Any]:
    """The ``subject`` of a results document."""
    return {
        "source": lm.source,
        "kind": "language",
        "algorithm": type(lm.model).__name__,
        "env": None,
        "parameters": lm.parameters,
        "sha256": lm.sha256 or None,
    }
