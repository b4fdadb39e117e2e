"""Text as windows of tokens, and what a model makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from rlquant.errors import InputError
from rlquant.llm.model import LanguageModel

__all__ = [
    "Agreement",
    "Windows",
    "compare_windows",
    "log_probabilities",
    "total_divergence",
    "window_losses",
]

_CHUNK_LOGITS = 2**25  # of a window's logits in float32 at once: 128 MB
_TOGETHER = 16  # windows in one forward on a GPU; on a CPU they would only take more memory


@dataclass(frozen=True)
class Windows:
    """A text cut into windows of equal length, the way perplexities are measured.

    Each window is read on its own, with nothing before it; what is predicted in it are its last ``scored`` tokens.
    What is left over at the end of the text is not used.

    Attributes:
        tokens: int64 ``[windows, length]``.
        stride: from one window's start to the next one's.
    """

    tokens: NDArray[np.int64]
    stride: int

    @classmethod
    def of(cls, ids: list[int], length: int, stride: int | None = None, limit: int | None = None) -> Windows:
        """Windows of ``length`` tokens every ``stride`` (by default as many), the first ``limit`` of them.

        Raises:
            InputError: the text is shorter than one window, or a length makes no sense.
        """
        stride = stride or length
        if length < 2 or not 1 <= stride <= length:
            raise InputError(
                f"a window of {length} tokens every {stride} is not possible: take at least 2, and a stride up to that"
            )
        starts = range(0, len(ids) - length + 1, stride)[:limit]
        if not starts:
            raise InputError(
                f"the text has {len(ids)} tokens, fewer than one window of {length}: give more text"
            )
        return cls(np.array([ids[start : start + length] for start in starts], np.int64), stride)

    def parted(self, count: int, seed: int = 0) -> tuple[Windows, Windows]:
        """``count`` windows drawn at random, and the others; both in the order of the text."""
        order = np.random.default_rng(seed).permutation(len(self.tokens))
        drawn, others = (np.sort(part) for part in (order[:count], order[count:]))
        return Windows(self.tokens[drawn], self.stride), Windows(self.tokens[others], self.stride)

    def first(self, count: int) -> Windows:
        """The first ``count`` of them, or all where there are fewer."""
        return Windows(self.tokens[:count], self.stride)

    @property
    def scored(self) -> int:
        """How many tokens are predicted in each window: those that no window before it predicted."""
        length = self.tokens.shape[1]
        return int(min(self.stride, length - 1))

    @property
    def protocol(self) -> str:
        """In words."""
        count, length = self.tokens.shape
        return (
            f"{count} windows of {length} tokens, stride {self.stride}, {count * self.scored:,} tokens predicted, "
            "each window on its own"
        )


def window_losses(
    lm: LanguageModel,
    windows: Windows,
    *,
    cache: Callable[[], Any] | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float64]:
    """Mean loss of each window in nats a token: float64 ``[windows]``; ``exp`` of their mean is the perplexity.

    Args:
        lm: the model.
        windows: what it reads.
        cache: makes a cache through which every window is read, for quantized KV caches; None for plain forwards.
        done: called with the number of windows done.

    Raises:
        InputError: a loss is not finite; the message says which window.
    """
    losses: list[float] = []
    for rows in _together(lm, windows):
        for row, hidden in zip(rows, _hidden(lm, rows, cache), strict=True):
            loss = float(_losses(lm, hidden, row, windows.scored).double().mean())
            if not np.isfinite(loss):
                raise InputError(
                    f"{lm.source} in {lm.precision} puts out NaN or infinity in window {len(losses)}"
                )
            losses.append(loss)
        done(len(losses))
    return np.array(losses)


@dataclass(frozen=True)
class Agreement:
    """How near the distributions of a model are to those of a reference, over all predicted tokens.

    Attributes:
        kl: mean Kullback-Leibler divergence from the reference, in nats a token.
        top1: share of tokens at which both find the same one most likely.
    """

    kl: float
    top1: float


def compare_windows(
    reference: LanguageModel,
    lm: LanguageModel,
    windows: Windows,
    *,
    cache: Callable[[], Any] | None = None,
) -> Agreement:
    """Both models on the same windows; ``lm`` reads them through a cache where one is given."""
    length = windows.tokens.shape[1]
    positions = range(length - 1 - windows.scored, length - 1)
    divergence = agreed = count = 0.0
    for rows in _together(lm, windows):
        for states in zip(_hidden(reference, rows, None), _hidden(lm, rows, cache), strict=True):
            for part in _chunks(positions, lm.vocabulary):
                pair = zip((reference, lm), states, strict=True)
                p, q = (log_probabilities(each, state[part]) for each, state in pair)
                q = q.to(p.device)
                divergence += total_divergence(p, q)
                agreed += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
                count += len(p)
    return Agreement(divergence / count, agreed / count)


def total_divergence(p: Tensor, q: Tensor) -> float:
    """Kullback-Leibler divergence from p in nats, of log-probabilities ``[tokens, vocabulary]``, summed over tokens."""
    return float((p.exp() * (p - q)).sum(dim=-1).double().sum())


def _together(lm: LanguageModel, windows: Windows) -> tuple[Tensor, ...]:
    """Windows that go through a model at once, int64 ``[n, length]`` each."""
    return torch.split(torch.from_numpy(windows.tokens), _TOGETHER if lm.device.type == "cuda" else 1)


def _hidden(lm: LanguageModel, rows: Tensor, cache: Callable[[], Any] | None) -> Tensor:
    """Last hidden states ``[n, length, hidden]``."""
    ids = rows.to(lm.device)
    with torch.no_grad():
        decoder = lm.model.get_decoder()
        if cache is not None:
            from rlquant.llm.kv_cache import GROUP_SIZE, forward_through_cache

            held = cache()
            return forward_through_cache(decoder, ids, held, getattr(held, "group_size", GROUP_SIZE))
        hidden: Tensor = decoder(ids, use_cache=False).last_hidden_state
        return hidden


def _losses(lm: LanguageModel, hidden: Tensor, row: Tensor, scored: int) -> Tensor:
    """Losses of the last ``scored`` tokens, the head's output in chunks: float32 ``[scored]``."""
    targets = row.to(hidden.device)
    losses = [
        -log_probabilities(lm, hidden[part]).gather(1, targets[[at + 1 for at in part]][:, None])[:, 0]
        for part in _chunks(range(len(row) - 1 - scored, len(row) - 1), lm.vocabulary)
    ]
    return torch.cat(losses)


def log_probabilities(lm: LanguageModel, hidden: Tensor) -> Tensor:
    """Of the next token, from last hidden states ``[..., hidden]``: float32 ``[..., vocabulary]``."""
    with torch.no_grad():
        return F.log_softmax(lm.model.get_output_embeddings()(hidden).float(), dim=-1)


def _chunks(positions: range, vocabulary: int) -> list[list[int]]:
    step = max(1, _CHUNK_LOGITS // vocabulary)
    every = list(positions)
    return [every[at : at + step] for at in range(0, len(every), step)]
