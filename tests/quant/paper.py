"""The methods' equations in float64 NumPy, written from the papers: oracles that share no code with rlquant.

A weight is ``[rows, columns]`` and its inputs ``[n, columns]``; a convolution's are its patches, cut out by
loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from calibration_data import correlated, linear
from numpy.typing import NDArray
from torch import nn

Floats = NDArray[np.float64]


@dataclass
class Case:
    """A layer, its inputs, and both as matrices."""

    layer: nn.Linear | nn.Conv2d
    x: torch.Tensor

    @property
    def weight(self) -> Floats:
        return self.layer.weight.detach().double().numpy().reshape(len(self.layer.weight), -1)

    @property
    def rows(self) -> Floats:
        if isinstance(self.layer, nn.Linear):
            return self.x.double().numpy()
        return patches(self.layer, self.x.double().numpy())

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    def by_channel(self, columns: Floats) -> Floats:
        """``[..., columns]`` -> ``[..., channels, columns of one]``."""
        return columns.reshape(*columns.shape[:-1], self.channels, -1)


def patches(layer: nn.Conv2d, images: Floats) -> Floats:
    """What every place of the output sees: ``[places, channels * kh * kw]``."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    padded = np.pad(images, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    return np.stack(
        [
            padded[n, :, i : i + kh, j : j + kw].ravel()
            for n in range(len(images))
            for i in range(0, padded.shape[2] - kh + 1, sh)
            for j in range(0, padded.shape[3] - kw + 1, sw)
        ]
    )


def case(kind: str, bias: bool = True) -> Case:
    """A small Linear or Conv2d with unequal channels; no more than 512 rows, so that a sample is all of them."""
    if kind == "linear":
        return Case(linear(12, 6, bias=bias), correlated(400, 12))
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 1, 1, generator=g) + 0.5 * torch.randn(12, 3, 6, 6, generator=g)
    images = images * torch.tensor([0.3, 1.0, 3.0]).view(3, 1, 1)
    return Case(nn.Conv2d(3, 5, 2, padding=(1, 0), stride=(2, 1), bias=bias), images)  # 12 * 4 * 5 places


def grid(low: Floats, high: Floats, levels: int) -> tuple[Floats, Floats]:
    """Scale and zero point of an asymmetric grid ``0 .. levels`` that covers the range and zero."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = np.where(high == low, 1.0, (high - low) / levels)
    return scale, np.clip(np.round(-low / scale), 0, levels)


def on_grid(x: Floats, scale: Floats, zero: Floats, levels: int) -> Floats:
    return (np.clip(np.round(x / scale) + zero, 0, levels) - zero) * scale


def nearest(weight: Floats, bits: int, shrink: float | Floats = 1.0) -> Floats:
    """Symmetric, one scale per row from its largest magnitude times ``shrink``."""
    limit = 2 ** (bits - 1) - 1
    scale = shrink * np.abs(weight).max(axis=1, keepdims=True) / limit
    return np.clip(np.round(weight / scale), -limit, limit) * scale


def output_error(weight: Floats, other: Floats, rows: Floats) -> Floats:
    """Squared output error of each row of the weight."""
    return np.square(rows @ (weight - other).T).sum(axis=0)


def hessian_of(rows: Floats, centred: bool) -> Floats:
    rows = rows - rows.mean(axis=0) if centred else rows
    return rows.T @ rows / len(rows)


def obq(weight: Floats, hessian: Floats, order: list[int], scale: Floats, limit: int) -> Floats:
    """The codes of one row by the OBQ update (GPTQ, equation 2), the inverse computed anew each step."""
    weight, left = weight.copy(), list(order)
    codes = np.zeros(len(weight))
    for q in order:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        codes[q] = np.clip(np.round(weight[q] / scale[q]), -limit, limit)
        error = weight[q] - codes[q] * scale[q]
        at = left.index(q)
        weight[left] -= error / inverse[at, at] * inverse[at]
        left.remove(q)
    return codes


def quadratic(errors: Floats, hessian: Floats) -> Floats:
    """``e H e^T`` of each row."""
    return np.einsum("ri,ij,rj->r", errors, hessian, errors)


def half_quadratic(block: Floats, bits: int, symmetric: bool) -> tuple[float, float, Floats]:
    """HQQ's alternation on the values of one scale: its best iterate's scale, zero point and values.

    ``e = shrink(W - Q(W))``, then the least squares fit of the codes to ``W - e``; the zero point's is HQQ's
    ``mean(codes - (W - e) / scale)``, rounded to the grid, and the scale's is ``<q, W - e> / <q, q>``.
    """
    if symmetric:
        low, high = -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
        scale, zero = np.abs(block).max() / high, 0.0
    else:
        low, high = 0, 2**bits - 1
        scale, zero = (float(part) for part in grid(block.min(), block.max(), high))
    best = (np.inf, scale, zero, block)
    beta = 10.0
    for _ in range(20):
        codes = np.clip(np.round(block / scale) + zero, low, high)
        error = block - (codes - zero) * scale
        loss = (np.abs(error) ** 0.7).sum()
        if loss < best[0]:
            best = (loss, scale, zero, (codes - zero) * scale)
        steps = np.maximum(np.abs(error / scale), 1e-30)
        forgiven = np.sign(error) * np.maximum(steps - steps ** (0.7 - 1) / beta, 0.0) * scale
        target = block - forgiven
        if not symmetric:
            zero = float(np.clip(np.round((codes - target / scale).mean()), low, high))
        away = codes - zero
        fitted = (away * target).sum() / (away * away).sum()
        scale = fitted if fitted > 0 else scale
        beta *= 1.01
    return best[1:]
