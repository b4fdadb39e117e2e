"""How often a model finds the chosen answer of a preference pair more likely than the rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rlquant.errors import InputError
from rlquant.llm.data import Messages, Pair, as_messages, as_text, prompt_text
from rlquant.llm.model import LanguageModel

__all__ = [
    "PreferenceAccuracy",
    "answer_distributions",
    "answer_log_probability",
    "answer_tokens",
    "pair_log_probabilities",
    "preference_accuracy",
]


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Shares of pairs in which the chosen answer is the likelier one.

    Attributes:
        summed: by the sum of its tokens' log-probabilities.
        per_token: by their mean, which favours no length.
        pairs: how many were compared.
        cut: how many were longer than the model reads, and lost the beginning of their prompt.
    """

    summed: float
    per_token: float
    pairs: int
    cut: int


def preference_accuracy(
    lm: LanguageModel, pairs: Sequence[Pair], *, longest: int | None = None
) -> PreferenceAccuracy:
    """Compare the answers of all pairs.

    Args:
        lm: the model, with its tokenizer.
        pairs: see :func:`rlquant.llm.data.read_pairs`.
        longest: tokens of prompt and answer together; by default what the model was made for.

    Raises:
        InputError: there is no pair, or an answer alone is too long.
    """
    if not pairs:
        raise InputError("there is no preference pair to compare")
    limit = min(longest or lm.longest, lm.longest)
    sums, lengths, cut = pair_log_probabilities(lm, pairs, limit)
    means = sums / lengths
    return PreferenceAccuracy(
        float((sums[:, 0] > sums[:, 1]).mean()), float((means[:, 0] > means[:, 1]).mean()), len(pairs), cut
    )


def pair_log_probabilities(
    lm: LanguageModel, pairs: Sequence[Pair], limit: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Log-probabilities of both answers of each pair.

    Args:
        lm: the model, with its tokenizer.
        pairs: prompts with a chosen and a rejected answer.
        limit: tokens of prompt and answer together; of longer ones the beginning of the prompt is left out.

    Returns:
        Nats ``[n, 2]`` of the chosen and the rejected answer, their tokens ``[n, 2]``, and how many pairs were cut.
    """
    sums, lengths, cut = np.empty((len(pairs), 2)), np.empty((len(pairs), 2), np.int64), 0
    for row, pair in enumerate(pairs):
        answers = [answer_tokens(lm, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        cut += any(len(prompt) + len(answer) > limit for prompt, answer in answers)
        sums[row] = [answer_log_probability(lm, prompt, answer, limit) for prompt, answer in answers]
        lengths[row] = [len(answer) for _, answer in answers]
    return sums, lengths, cut


def answer_log_probability(lm: LanguageModel, prompt: list[int], answer: list[int], longest: int) -> float:
    """Log-probability of the answer's tokens after the prompt, in nats; of a long prompt the end is read."""
    distributions = answer_distributions(lm, prompt, answer, longest)
    chosen = distributions.gather(1, torch.tensor(answer, device=distributions.device)[:, None])
    return float(chosen.double().sum())


def answer_distributions(lm: LanguageModel, prompt: list[int], answer: list[int], longest: int) -> Tensor:
    """Log-probabilities of every token at each place of an answer, float32 ``[tokens of the answer, vocabulary]``.

    Raises:
        InputError: the answer is empty or too long, or there is no prompt.
    """
    if not 0 < len(answer) < longest:
        raise InputError(f"an answer has {len(answer)} tokens; 1 to {longest - 1} are possible")
    ids = torch.tensor([prompt[-(longest - len(answer)) :] + answer], device=lm.device)
    if ids.shape[1] == len(answer):
        raise InputError("a preference pair has no prompt")
    with torch.no_grad():
        logits = lm.model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    return F.log_softmax(logits, dim=-1)


def answer_tokens(
    lm: LanguageModel, prompt: str | Messages, answer: str | Messages
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, as the chat template writes it where it is a chat, and of an answer."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return lm.tokens(prompt), lm.tokens(answer)
    end = as_messages(answer, "assistant")
    before = prompt_text(as_messages(prompt, "user"), lm.tokenizer)
    whole = "".join(turn["content"] for turn in end) if len(end) == 1 else as_text(end, lm.tokenizer)
    return lm.tokens(before), lm.tokens(whole)
