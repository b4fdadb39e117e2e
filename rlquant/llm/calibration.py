"""What a language model reads before it is quantized: windows of tokens from text, chats or preference data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.data import as_text, read_texts
from rlquant.llm.model import LanguageModel

__all__ = ["calibration_apart", "calibration_windows", "windows_of"]

_HELD_OUT = 0.2
"""Share of the text, at its end, that calibrates where no other data is given."""


def calibration_apart(
    lm: LanguageModel, ids: list[int], path: Path | None, *, windows: int, length: int, seed: int
) -> tuple[list[int], Tensor, str]:
    """Calibration windows from a file, or from the end of a text where there is none.

    Args:
        lm: whose tokens they are.
        ids: of the text.
        path: of the calibration data, or None.
        windows, length, seed: see :func:`windows_of`.

    Returns:
        The part of the text that is left to score, the windows as int64 ``[windows, length]``, and in words what
        they are.

    Raises:
        InputError: the file cannot be read, or there is less than one window.
    """
    if path is not None:
        return ids, calibration_windows(lm, path, windows=windows, length=length, seed=seed), path.name
    cut = int(len(ids) * (1 - _HELD_OUT))
    drawn = windows_of([ids[cut:]], windows=windows, length=length, seed=seed, what="the end of the text")
    return ids[:cut], drawn, f"the last {_HELD_OUT:.0%} of the text, which are not scored"


def calibration_windows(
    lm: LanguageModel, path: str | Path, *, windows: int = 128, length: int = 512, seed: int = 0
) -> Tensor:
    """Windows of calibration data from a file, see :func:`rlquant.llm.data.read_texts`; chats by the chat template.

    Returns:
        int64 ``[windows, length]``; see :func:`windows_of`.

    Raises:
        InputError: the file cannot be read, or holds less than one window.
    """
    texts = [lm.tokens(as_text(text, lm.tokenizer)) for text in read_texts(path)]
    return windows_of(texts, windows=windows, length=length, seed=seed, what=str(path))


def windows_of(
    texts: list[list[int]], *, windows: int, length: int, seed: int, what: str = "the text"
) -> Tensor:
    """Windows drawn from tokenized texts, joined one after the other: without overlap and in random order where there
    are more than enough, else fewer than asked for.

    Returns:
        int64 ``[at most windows, length]``.

    Raises:
        InputError: less than one window.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(texts))
    joined = np.concatenate([np.asarray(texts[index], np.int64) for index in order])
    count = len(joined) // length
    if count == 0:
        raise InputError(
            f"{what} has {len(joined)} tokens, fewer than one calibration window of {length}: give more text"
        )
    every = joined[: count * length].reshape(count, length)
    chosen = np.sort(generator.permutation(count)[:windows])
    return torch.from_numpy(every[chosen])
