"""Error metrics between a tensor and its quantized version."""

from __future__ import annotations

import math

from torch import Tensor

from rlquant.errors import InputError

__all__ = ["max_error", "mse", "sqnr_db"]


def mse(reference: Tensor, quantized: Tensor) -> float:
    """Mean squared error, in squared units of the tensors, which have one shape."""
    return float(_difference(reference, quantized).square().mean())


def max_error(reference: Tensor, quantized: Tensor) -> float:
    """Largest absolute error, in units of the tensors, which have one shape."""
    return float(_difference(reference, quantized).abs().max())


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise ratio in dB, ``10 log10(sum x^2 / sum (x - q)^2)``.

    inf where the tensors are equal, -inf where the reference is all zero and they differ.
    """
    noise = float(_difference(reference, quantized).square().sum())
    signal = float(reference.detach().double().square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _difference(reference: Tensor, quantized: Tensor) -> Tensor:
    if reference.shape != quantized.shape or reference.numel() == 0:
        raise InputError(
            f"cannot compare shapes {tuple(reference.shape)} and {tuple(quantized.shape)}: "
            "the tensors must have one shape and at least one element"
        )
    return reference.detach().double() - quantized.detach().double()
