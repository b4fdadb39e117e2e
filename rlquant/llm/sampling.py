"""From logits to tokens, with a random stream for each sequence: what is sampled depends on nothing beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlquant.errors import InputError

__all__ = ["ROLLOUTS", "Rollouts", "Sampling", "choose", "uniform"]

Rollouts = Literal["transformers", "rlquant", "rlquant-dense"]
ROLLOUTS = "what samples: transformers' generate, rlquant.llm.engine, or that with base and adapter added up"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest.
        top_k: the so many likeliest only; 0 for all (Fan et al. 2018, arXiv:1805.04833).
        top_p: the likeliest that together have this probability (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: those at least this share of the likeliest's probability (Nguyen et al. 2024, arXiv:2407.01082).

    Raises:
        InputError: one is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value, good, needed in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not good:
                raise InputError(f"{name} is {value}: it must be {needed}")


def choose(logits: Tensor, sampling: Sampling, seeds: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row, and its log-probability.

    Args:
        logits: float32 ``[batch, vocabulary]``.
        sampling: how. One pass over the cumulative probabilities finds the token, without a sort unless top-p asks.
        seeds: int64 ``[batch]``, of the sequences.
        places: int64 ``[batch]``, of the tokens in their sequences.

    Returns:
        int64 ``[batch]``; float32 ``[batch]``, at the temperature (1 where it is 0) but of the whole distribution, as
        training computes it.
    """
    log_probs = (logits / (sampling.temperature or 1.0)).log_softmax(dim=-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        summed = _kept(log_probs.exp(), sampling).cumsum(dim=-1)
        threshold = uniform(seeds, places)[:, None] * summed[:, -1:]
        last = (summed < summed[:, -1:]).sum(dim=-1)  # where rounding leaves nothing above the threshold
        tokens = torch.minimum((summed <= threshold).sum(dim=-1), last)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def uniform(seeds: Tensor, places: Tensor) -> Tensor:
    """Numbers in [0, 1), float32, one for each seed and place: the same on every device.

    SplitMix64 (Steele, Lea and Flood 2014), whose state jumps to any place; int64 wraps around as its integers do.
    """
    x = seeds + (places + 1) * -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return _shifted(x ^ _shifted(x, 31), 40).to(torch.float32) / 2**24


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in, which int64 does not do with its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _kept(probs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities with zero for what is cut off."""
    if sampling.top_k and sampling.top_k < probs.shape[-1]:
        least = probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < least, 0.0)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        total = ordered.sum(dim=-1, keepdim=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p * total  # what is likelier has it already
        probs = torch.zeros_like(probs).scatter(1, order, ordered.masked_fill(beyond, 0.0))
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    return probs
