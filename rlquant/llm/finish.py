"""Scoring what a fine-tuning run learned, its samples and its card; the arithmetic is in ``outcome.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlquant.llm.adapters import active_adapter, adapter_parameters, save_adapter, use_adapter
from rlquant.llm.backbone import Backbone, BaseSettings
from rlquant.llm.calibration import windows_of
from rlquant.llm.data import Pair, as_text
from rlquant.llm.load import DTYPES
from rlquant.llm.merge import MergeSettings, deployed, merged
from rlquant.llm.model import LanguageModel
from rlquant.llm.outcome import Contender, Outcome
from rlquant.llm.preferences import (
    answer_distributions,
    answer_log_probability,
    answer_tokens,
    pair_log_probabilities,
)
from rlquant.llm.rollout import Reward, completer, scores_of
from rlquant.llm.text import total_divergence
from rlquant.llm.training import ADAPTER
from rlquant.measure import plain
from rlquant.quant import weight_bytes
from rlquant.runs import RunFolder

__all__ = [
    "Scorer",
    "compare_models",
    "divergence_from_base",
    "pair_scorer",
    "reward_scorer",
    "text_scorer",
    "write_samples",
]

Row = Mapping[str, Any]
Scores = tuple[NDArray[np.float64], dict[str, float]]
Scorer = Callable[[LanguageModel], Scores]
"""From a model to the score of each held-out row, and what else was measured by name."""

_SAMPLES, _DIVERGENCES = 4, 16
_TOGETHER = 32
"""Completions that are sampled at a time."""


def compare_models(
    run: RunFolder,
    backbone: Backbone,
    model: Any,
    base: BaseSettings,
    *,
    scorer: Scorer,
    task: str,
    score: str,
    sample: str,
    merge: MergeSettings | None,
    calibration: Sequence[Row] = (),
    new_tokens: int = 0,
    adapter: str = ADAPTER,
    keep: Callable[[str, LanguageModel], None] = lambda _name, _lm: None,
) -> Outcome:
    """Score base, tuned and merged models; save the adapter. Finished models are not scored again.

    Args:
        run: keeps the adapter, and finished scores for a resumed run.
        backbone: what adapters were put on.
        model: with the adapter.
        base: what the backbone was made of.
        scorer: see :data:`Scorer`.
        task, score, sample: see :class:`~rlquant.llm.outcome.Outcome`.
        merge: what becomes of the adapter; None merges nothing.
        calibration: rows that the run learned from. Quantization of the merged model looks at them, and where they
            are prompts without an answer at the tuned model's own answers, which is what it will write.
        new_tokens: of these answers.
        adapter: what was trained; it is the active one afterwards.
        keep: is shown each merged model once, with its name.
    """
    use_adapter(model, adapter)
    save_adapter(model, adapter, run.path / "adapter")
    lm = backbone.lm
    tuned = lm.but(model=model.eval())
    learned = sum(each.numel() * each.element_size() for each in adapter_parameters(model, adapter).values())

    def scored(
        name: str, precision: str, method: str, make: Callable[[], LanguageModel], weights: int | None = None
    ) -> Contender:
        kept = run.piece(f"scores-{name}")
        if kept is None:
            candidate = make()
            scores, notes = scorer(candidate)
            kept = {
                "scores": scores.tolist(),
                "notes": plain(notes),
                "weights": weight_bytes(candidate.model) if weights is None else weights,
            }
            run.save_piece(f"scores-{name}", kept)
        return Contender(precision, method, np.array(kept["scores"]), kept["weights"], kept["notes"])

    with active_adapter(model, None):
        before = scored("base", base.precision, "none", lambda: tuned, backbone.weights)
    after = scored("tuned", f"{base.precision}+lora", task, lambda: tuned, backbone.weights + learned)
    done = []
    if merge is not None:
        whole = cache(partial(merged, base, run.path / "adapter", merge.onto))
        windows = cache(partial(_windows, tuned, calibration, merge, new_tokens))

        def make(name: str, precision: str, method: str) -> LanguageModel:
            own = whole().but(model=copy.deepcopy(whole().model))
            if precision in DTYPES:
                own.model.to(base.on, DTYPES[precision])
            else:
                own = deployed(own, precision, method, windows, base.on)
            keep(name, own)
            return own

        for precision in merge.precisions:
            for method in ("none",) if precision in DTYPES else merge.methods:
                name = f"merged-{precision}-{method}"
                done.append(scored(name, precision, method, partial(make, name, precision, method)))
    return Outcome(task, score, sample, before, after, done)


def pair_scorer(rows: Sequence[Row], longest: int) -> Scorer:
    """1 where the chosen answer of a pair is likelier than the rejected one, else 0; the chosen ones' perplexity."""
    pairs = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]

    def score(lm: LanguageModel) -> Scores:
        sums, lengths, _ = pair_log_probabilities(lm, pairs, longest)
        perplexity = float(np.exp(-sums[:, 0].sum() / lengths[:, 0].sum()))
        margin = float((sums[:, 0] - sums[:, 1]).mean())
        return (sums[:, 0] > sums[:, 1]).astype(np.float64), {"perplexity": perplexity, "margin": margin}

    return score


def text_scorer(rows: Sequence[Row], longest: int) -> Scorer:
    """Mean log-probability, in nats, of the tokens of each answer after its prompt, or of a text after its first."""

    def score(lm: LanguageModel) -> Scores:
        means, lengths = np.empty(len(rows)), np.empty(len(rows))
        for number, row in enumerate(rows):
            prompt, answer = _read(lm, row)
            means[number] = answer_log_probability(lm, prompt, answer, longest) / len(answer)
            lengths[number] = len(answer)
        perplexity = float(np.exp(-(means * lengths).sum() / lengths.sum()))
        return means, {"perplexity": perplexity}

    return score


def reward_scorer(
    rows: Sequence[Row], reward: Reward, *, new_tokens: int, samples: int, batch: int = _TOGETHER
) -> Scorer:
    """Mean reward of sampled completions of each prompt (text, under ``prompt``), always with the same seeds."""
    asked = [dict(row) for row in rows for _ in range(samples)]

    def score(lm: LanguageModel) -> Scores:
        scores: list[float] = []
        lengths: list[int] = []
        complete = completer(lm, max_new_tokens=new_tokens)
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            made = complete([lm.tokens(row["prompt"]) for row in part], start)
            texts = lm.tokenizer.batch_decode(made, skip_special_tokens=True)
            numbers = [(start + place) // samples for place in range(len(part))]
            scores += scores_of(reward, [row["prompt"] for row in part], texts, part, numbers)
            lengths += map(len, made)
        means = np.array(scores).reshape(-1, samples).mean(axis=1)
        return means, {"tokens": float(np.mean(lengths))}

    return score


def divergence_from_base(lm: LanguageModel, model: Any, rows: Sequence[Row], longest: int) -> float:
    """Mean Kullback-Leibler divergence of the tuned model from its base over the answers of some rows, nats a token."""
    total, count = 0.0, 0
    both = lm.but(model=model.eval())
    for row in rows[:_DIVERGENCES]:
        prompt, answer = _read(lm, row)
        tuned = answer_distributions(both, prompt, answer, longest)
        with active_adapter(model, None):
            base = answer_distributions(both, prompt, answer, longest)
        total += total_divergence(tuned, base)
        count += len(answer)
    return total / max(count, 1)


def write_samples(
    run: RunFolder, lm: LanguageModel, model: Any, rows: Sequence[Row], *, new_tokens: int = 64
) -> str:
    """Greedy answers of base and tuned model to the first held-out prompts, as ``samples.md``; its text."""
    both = lm.but(model=model.eval())
    asked = [row for row in rows if "prompt" in row][:_SAMPLES]
    prompts = [answer_tokens(lm, row["prompt"], "")[0][-(lm.longest - new_tokens) :] for row in asked]
    tuned = _answers(both, prompts, new_tokens) if asked else []
    with active_adapter(model, None):
        base = _answers(both, prompts, new_tokens) if asked else []
    lines = ["| prompt | base | tuned |", "|---|---|---|"]
    for row, one, other in zip(asked, base, tuned, strict=True):
        lines.append(
            "| " + " | ".join(_cell(text) for text in (as_text(row["prompt"], None), one, other)) + " |"
        )
    text = "\n".join(lines) + "\n"
    run.write("samples.md", text)
    return text


def _answers(lm: LanguageModel, prompts: list[list[int]], new_tokens: int) -> list[str]:
    made = completer(lm, max_new_tokens=new_tokens, temperature=0.0)(prompts, 0)
    texts: list[str] = lm.tokenizer.batch_decode(made, skip_special_tokens=True)
    return texts


def _cell(text: str) -> str:
    """Any text as one cell of a Markdown table, its beginning and its end where it is long."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 300 else f"{line[:140]} ... {line[-140:]}"


def _read(lm: LanguageModel, row: Row) -> tuple[list[int], list[int]]:
    """Tokens of what comes first and of what is scored."""
    if "prompt" not in row:
        tokens = lm.tokens(row["text"])
        return tokens[:1], tokens[1:]
    return answer_tokens(lm, row["prompt"], _answer(row))


def _windows(lm: LanguageModel, rows: Sequence[Row], merge: MergeSettings, new_tokens: int) -> Tensor:
    """Calibration tokens of the run's own data, int64 ``[windows, length]``."""
    asked, shown = [], []
    for row in rows:
        if "prompt" not in row:
            shown.append(row["text"])
        elif _answer(row) is None:
            asked.append(row)
        else:
            shown.append(row["prompt"] + _answer(row))
    texts = [lm.tokens(as_text(each, lm.tokenizer)) for each in shown]
    wanted = merge.windows * merge.length
    seed, complete = 0, completer(lm, max_new_tokens=new_tokens)
    while asked and sum(map(len, texts)) < wanted:
        for start in range(0, len(asked), _TOGETHER):
            prompts = [lm.tokens(row["prompt"]) for row in asked[start : start + _TOGETHER]]
            made = complete(prompts, seed)
            texts += [prompt + answer for prompt, answer in zip(prompts, made, strict=True)]
            seed += 1
    return windows_of(texts, windows=merge.windows, length=merge.length, seed=0, what="the run's data")


def _answer(row: Row) -> Any:
    """The (chosen) answer to a prompt; None where the data has none."""
    return row.get("chosen", row.get("completion"))
