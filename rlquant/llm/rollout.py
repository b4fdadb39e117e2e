"""Rollouts: prompts are completed by the policy, laid out in one batch, and scored.

What completes them is a function of token ids, so that a faster engine can take the place of transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.adapters import base_model
from rlquant.llm.data import prompt_text
from rlquant.llm.dense_policy import Dense
from rlquant.llm.engine import Completion
from rlquant.llm.engine_sampler import DENSE, EngineSampler, settled
from rlquant.llm.model import LanguageModel
from rlquant.llm.roles import Roles
from rlquant.llm.sampling import Sampling

__all__ = [
    "Complete",
    "EngineGenerate",
    "Generate",
    "Reward",
    "Rollout",
    "TransformersGenerate",
    "completer",
    "eos_ids",
    "generate_with",
    "lay_out",
    "planned_rollouts",
    "refuse_cache",
    "sample",
    "scores_of",
    "with_prompt_text",
]

Reward = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
"""``(prompts, completions, rows) -> a score for each``; special tokens are left out of the completions."""


class Generate(Protocol):
    """Completes prompts with the policy as it is now."""

    def __call__(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Completion]:
        """A completion of each prompt in their order, the end-of-sequence token included where it was sampled.

        Sampled at the temperature of training from the whole distribution: what top-k, top-p or a repetition penalty
        cut off would be missing from the log-probabilities. The same seed gives the same completions. Those that tell
        the log-probabilities that they were sampled at let PPO see how far these are from its own.
        """


@dataclass(frozen=True)
class Rollout:
    """Prompts, left-padded, and their completions, right-padded, side by side.

    Attributes:
        ids: int64 ``[batch, prompt + completion]``.
        mask: bool of that shape, the tokens that are no padding.
        completed: bool ``[batch, completion]``, the tokens of the completions, their eos included.
        ended: bool ``[batch]``, whether a completion came to its eos.
        sampled: float32 ``[batch, completion]``, log-probabilities of the tokens as they were sampled; None where
            they are not known.
    """

    ids: Tensor
    mask: Tensor
    completed: Tensor
    ended: Tensor
    sampled: Tensor | None = None

    @property
    def length(self) -> int:
        """Of the completions' part."""
        return self.completed.shape[1]


def eos_ids(lm: LanguageModel) -> set[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation settings."""
    config = base_model(lm.model).generation_config
    found = getattr(config, "eos_token_id", None)
    ids = set(found) if isinstance(found, (list, tuple)) else {found}
    ids.add(lm.tokenizer.eos_token_id)
    return {int(each) for each in ids if each is not None}


class TransformersGenerate:
    """Sampling by ``generate`` of transformers, with left padding.

    Args:
        roles: whose policy completes.
        max_new_tokens: of a completion.
        temperature: of the sampling; greater than 0.
    """

    def __init__(self, roles: Roles, *, max_new_tokens: int, temperature: float = 1.0) -> None:
        self.roles, self.max_new_tokens, self.temperature = roles, max_new_tokens, temperature

    def __call__(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Completion]:
        """See :class:`Generate`."""
        new, temperature = self.max_new_tokens, self.temperature
        with self.roles.acting("policy"):
            made = sample(self.roles.lm, prompts, seed=seed, max_new_tokens=new, temperature=temperature)
        return [Completion(number, 0, ids) for number, ids in enumerate(made)]


class EngineGenerate:
    """Sampling by :class:`~rlquant.llm.engine.Engine`.

    Args:
        roles: whose policy completes.
        max_new_tokens: of a completion.
        temperature: of the sampling; greater than 0.
        dense, cache: see :class:`~rlquant.llm.engine_sampler.EngineSampler`.

    Raises:
        InputError: as :class:`~rlquant.llm.decoding.Decoder`.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        dense: Dense | None = None,
        cache: str | None = None,
    ) -> None:
        self.roles, self.ends = roles, eos_ids(roles.lm)
        self.sampler = EngineSampler(
            roles.model,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature),
            dense=dense,
            cache=cache,
        )

    def __call__(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Completion]:
        """See :class:`Generate`."""
        with self.roles.acting("policy"):
            return self.sampler(prompts, stop=self.ends, seed=seed)


def generate_with(
    rollouts: str, roles: Roles, *, max_new_tokens: int, temperature: float = 1.0, cache: str | None = None
) -> Generate:
    """What the settings name, see :data:`~rlquant.llm.sampling.ROLLOUTS`.

    Raises:
        InputError: as :class:`EngineGenerate`, or the cache of another engine is to be quantized.
    """
    chosen = settled(rollouts, roles.model)
    if chosen == "transformers":
        refuse_cache(cache)
        return TransformersGenerate(roles, max_new_tokens=max_new_tokens, temperature=temperature)
    return EngineGenerate(
        roles, max_new_tokens=max_new_tokens, temperature=temperature, dense=DENSE.get(chosen), cache=cache
    )


def planned_rollouts(rollouts: str, cache: str | None) -> dict[str, Any]:
    """What the planner's workload is told of them, see :class:`~rlquant.llm.memory.Workload`."""
    bytes_of = {"float": 2, "int8": 1}
    dense = DENSE.get(rollouts)
    return {
        "cached": rollouts != "transformers",
        "dense": bytes_of[dense] if dense else 0,
        "kv": cache or "bf16",
    }


def refuse_cache(cache: str | None) -> None:
    """For what is not the engine. Raises InputError where a quantized cache is asked for."""
    if cache is not None:
        raise InputError(
            f"kv_cache = {cache!r} is the engine's: set rollouts=rlquant (ppo.rollouts in PPO), or kv_cache=null for "
            "another sampler"
        )


Complete = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""``(prompts, seed) -> completions``, as token ids."""


def completer(lm: LanguageModel, *, max_new_tokens: int, temperature: float = 1.0) -> Complete:
    """Completions by a model as it acts now, see :class:`Generate`; the likeliest tokens at temperature 0.

    The engine makes them on a GPU for the architectures that it knows, and transformers' ``generate`` elsewhere.
    """
    if settled("auto", lm.model) == "transformers":
        return lambda prompts, seed: sample(
            lm, prompts, seed=seed, max_new_tokens=max_new_tokens, temperature=temperature
        )
    sampler = EngineSampler(lm.model, max_new_tokens=max_new_tokens, sampling=Sampling(temperature))
    ends = eos_ids(lm)
    return lambda prompts, seed: [each.ids for each in sampler(prompts, stop=ends, seed=seed)]


@torch.no_grad()
def sample(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Completions by transformers' ``generate``, see :func:`completer`.

    The model's own generation settings (top-k, top-p, repetition penalty; Qwen2.5-Instruct has all three) are not used.
    """
    from transformers import GenerationConfig

    model, ends = base_model(lm.model), eos_ids(lm)
    pad = lm.tokenizer.pad_token_id
    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    plain = GenerationConfig(
        **(chosen if temperature else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad if pad is not None else 0,
    )
    laid = lay_out(prompts, [[] for _ in prompts], ends, lm.device)
    device = laid.ids.device
    before, model.generation_config = model.generation_config, plain  # whose settings would fill gaps of ours
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = model.generate(laid.ids, attention_mask=laid.mask.long(), generation_config=plain)
    finally:
        model.generation_config = before
    rows: list[list[int]] = out[:, laid.ids.shape[1] :].tolist()
    return [_until(row, ends) for row in rows]


def lay_out(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    ends: set[int],
    device: Any = "cpu",
    *,
    sampled: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """One batch of prompts and completions. Padding is token 0, and the mask alone tells it from text.

    ``sampled`` are the log-probabilities of the completions' tokens, where they are known.
    """
    before, after = max(map(len, prompts)), max(map(len, completions))
    ids = [
        [*[0] * (before - len(prompt)), *prompt, *completion, *[0] * (after - len(completion))]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    places = torch.arange(before + after, device=device)
    first = torch.tensor([before - len(prompt) for prompt in prompts], device=device)
    last = torch.tensor([before + len(completion) for completion in completions], device=device)
    mask = (places >= first[:, None]) & (places < last[:, None])
    ended = torch.tensor([bool(each) and each[-1] in ends for each in completions], device=device)
    known = None
    if sampled is not None:
        known = torch.tensor([[*each, *[0.0] * (after - len(each))] for each in sampled], device=device)
    return Rollout(torch.tensor(ids, device=device), mask, mask[:, before:], ended, known)


def with_prompt_text(lm: LanguageModel, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose prompt is the text that a policy reads, see :func:`~rlquant.llm.data.prompt_text`."""
    return [{**row, "prompt": prompt_text(row["prompt"], lm.tokenizer)} for row in rows]


def scores_of(
    reward: Reward, prompts: list[str], completions: list[str], rows: list[dict[str, Any]], numbers: list[int]
) -> list[float]:
    """Scores of completions, checked.

    Args:
        reward: gives them.
        prompts, completions, rows: what it is given.
        numbers: of the rows in their data set, for messages.

    Raises:
        InputError: it raised, gave another number of scores, or one that is no finite number. The row is named.
    """
    try:
        scores = list(reward(prompts, completions, rows))
    except InputError:
        raise
    except Exception as error:
        row = _culprit(reward, prompts, completions, rows, numbers)
        raise InputError(f"the reward function raised at {row}: {type(error).__name__}: {error}") from error
    if len(scores) != len(prompts):
        raise InputError(
            f"the reward function gave {len(scores)} scores for the {len(prompts)} completions of rows "
            f"{', '.join(map(str, numbers))}: one for each is needed"
        )
    for number, completion, score in zip(numbers, completions, scores, strict=True):
        if not _is_finite(score):
            raise InputError(
                f"the reward function gave {score!r} at row {number}, for the completion {completion[:60]!r}: a "
                "finite number is needed"
            )
    return [float(score) for score in scores]


def _is_finite(score: Any) -> bool:
    try:
        return not isinstance(score, str) and math.isfinite(score)
    except (TypeError, ValueError):
        return False


def _culprit(
    reward: Reward,
    prompts: list[str],
    completions: list[str],
    rows: Sequence[Mapping[str, Any]],
    numbers: list[int],
) -> str:
    """The row that a reward function raises at, found by asking for one after the other."""
    for number, prompt, completion, row in zip(numbers, prompts, completions, rows, strict=True):
        try:
            reward([prompt], [completion], [dict(row)])
        except Exception:
            return f"row {number}, for the completion {completion[:60]!r}"
    return f"rows {', '.join(map(str, numbers))} together, though at none of them alone"


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """Tokens up to the first that ends, and it; what follows is padding, whatever its id."""
    for place, each in enumerate(ids):
        if each in ends:
            return ids[: place + 1]
    return ids
