"""From logits to tokens, with a random stream for each sequence: what is sampled depends on nothing beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlquant.errors import InputError

__all__ = ["KV_CACHE", "ROLLOUTS", "Rollouts", "Sampling", "choose", "exponential", "stream"]

Rollouts = Literal["auto", "transformers", "rlquant", "rlquant-dense", "rlquant-int8"]
ROLLOUTS = (
    "what samples: transformers' generate, rlquant.llm.engine, or that with base and adapter added up, as floats or "
    "rounded to int8; auto: the engine on a GPU, for the architectures that it knows"
)
KV_CACHE = "how the engine's KV cache is quantized; null: not at all"


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

    @property
    def filters(self) -> bool:
        """Whether less than the whole distribution is sampled from."""
        return bool(self.top_k or self.top_p < 1 or self.min_p > 0)

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
        sampling: how.
        seeds: int64 ``[batch]``, of the sequences.
        places: int64 ``[batch]``, of the tokens in their sequences.

    Returns:
        int64 ``[batch]``; float32 ``[batch]``, at the temperature (1 where it is 0) but of the whole distribution, as
        training computes it.
    """
    scaled = logits / (sampling.temperature or 1.0)
    log_probs = scaled.log_softmax(dim=-1)
    if sampling.temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        kept = _kept(log_probs, sampling) if sampling.filters else log_probs
        tokens = (kept - exponential(seeds, places, logits.shape[-1]).log_()).argmax(dim=-1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def exponential(seeds: Tensor, places: Tensor, count: int) -> Tensor:
    """Standard exponential numbers, float32 ``[batch, count]``, the same on every device up to the last bit.

    Among tokens of probability p, that of the least number / p is a sample (the exponential race behind the Gumbel-max
    trick, Maddison et al. 2014, arXiv:1411.0030). A row's stream is SplitMix64's (Steele, Lea and Flood 2014), which
    jumps to any place; a token's bits are lowbias32 (Wellons 2018) of both halves of that and its id.
    """
    each = stream(seeds, places)
    low, high = (_int32(part)[:, None] for part in (each, each >> 32))
    ids = torch.arange(count, dtype=torch.int32, device=seeds.device)
    bits = _mixed(_mixed(ids ^ low) ^ high)
    u = bits.to(torch.float32)
    u = (torch.where(bits < 0, u + 2.0**32, u) + 0.5) * 2.0**-32
    small = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))  # where 1 - u would lose the bits of u
    return torch.where(u < 2.0**-6, small, -(1 - u).clamp_(min=2.0**-25).log_())


def stream(seeds: Tensor, places: Tensor) -> Tensor:
    """int64, one for each seed and place; int64 wraps around as SplitMix64's integers do."""
    x = seeds + (places + 1) * -7046029254386353131
    x = (x ^ _shifted(x, 30)) * -4658895280553007687
    x = (x ^ _shifted(x, 27)) * -7723592293110705685
    return x ^ _shifted(x, 31)


def _int32(x: Tensor) -> Tensor:
    """The low half of int64."""
    x = x & 0xFFFFFFFF
    return (x - ((x >> 31) << 32)).to(torch.int32)


def _mixed(x: Tensor) -> Tensor:
    """lowbias32, in place of int32, which wraps around as uint32 does."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x.mul_(0x7FEB352D)
    x = x.bitwise_xor_((x >> 15) & 0x1FFFF)
    x = x.mul_(-2073254261)
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in, which int64 does not do with its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _kept(log_probs: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities with -inf for what is cut off."""
    if sampling.top_k and sampling.top_k < log_probs.shape[-1]:
        least = log_probs.topk(sampling.top_k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = log_probs.sort(dim=-1, descending=True)
        probs = ordered.exp()
        beyond = probs.cumsum(dim=-1) - probs >= sampling.top_p * probs.sum(
            dim=-1, keepdim=True
        )  # without it enough
        log_probs = log_probs.scatter(1, order, ordered.masked_fill(beyond, -torch.inf))
    if sampling.min_p > 0:
        least = log_probs.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        log_probs = log_probs.masked_fill(log_probs < least, -torch.inf)
    return log_probs
