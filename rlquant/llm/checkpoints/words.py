"""Codes in 32-bit words, as checkpoints store them, and as this library does."""

from __future__ import annotations

import torch
from torch import Tensor

from rlquant.quant import pack, unpack

__all__ = ["from_words", "to_words"]


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[rows, n]`` in ``0 .. 2**bits - 1`` -> int32 ``[rows, n * bits / 32]``, least significant bits first.

    A row takes whole words: ``n * bits`` is a multiple of 32. Codes of 3 bits lie across words.
    """
    return pack(codes, bits).view(torch.int32).view(len(codes), -1)


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of each row: int32 ``[rows, words]`` -> int32 ``[rows, count]``."""
    rows, held = len(words), words.shape[1] * 32 // bits
    octets = words.contiguous().view(torch.uint8).view(-1)
    return unpack(octets, bits, rows * held).view(rows, held)[:, :count]
