"""Activation-aware clipping: the range of every scale is the one of least output error.

A narrower range rounds most weights more finely and clips the largest. For each scale the range is searched
over fractions 1 .. 0.2 of min-max, by the squared error of the output that its weights add up to on sampled
inputs, ``|X_g (w_g - quant(w_g))|^2`` with the columns g that share the scale. Rounding is to nearest.

Source: the clipping search of AWQ (Lin et al. 2023, arXiv:2306.00978), here for symmetric, asymmetric, float
and codebook formats, per group, channel or tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlquant.quant.affine import QParams, fake_quantize, qparams_from_range
from rlquant.quant.granularity import row_chunks
from rlquant.quant.moments import InputMoments
from rlquant.quant.observers import weight_ranges
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import nearest_codes, spread_qparams

__all__ = ["clip", "clipped_qparams"]

STEPS = 33
SMALLEST = 0.2


def clip(
    matrix: Tensor, scheme: Scheme, moments: InputMoments | None, what: str
) -> tuple[Tensor, QParams | None]:
    """Codes ``[rows, columns]`` and qparams of a float weight whose inputs were sampled."""
    assert moments is not None
    qparams = clipped_qparams(matrix, scheme, moments.rows[0])
    return nearest_codes(matrix, qparams, scheme), qparams


def clipped_qparams(matrix: Tensor, scheme: Scheme, inputs: Tensor) -> QParams:
    """The qparams of least output error: weight ``[rows, columns]``, inputs ``[m, columns]``, float32."""
    low, high = weight_ranges(matrix, scheme.stored, scheme.granularity)
    factors = _factors(inputs, scheme.granularity.group_size or matrix.shape[1])
    best = torch.ones_like(low)
    best_loss = torch.full_like(low, torch.inf)
    for fraction in torch.linspace(1.0, SMALLEST, STEPS).tolist():
        loss = _losses(
            matrix, qparams_from_range(low * fraction, high * fraction, scheme.stored), scheme, factors
        )
        best = torch.where(loss < best_loss, fraction, best)
        best_loss = torch.minimum(loss, best_loss)
    return qparams_from_range(low * best, high * best, scheme.stored)


def _factors(inputs: Tensor, group: int) -> list[Tensor]:
    """Inputs by group of columns; where taller than wide, their R factor: ``|X e| = |R e|``."""
    parts = torch.split(inputs, group, dim=1)
    return [torch.linalg.qr(part, mode="r").R if len(part) > part.shape[1] else part for part in parts]


def _losses(matrix: Tensor, qparams: QParams, scheme: Scheme, factors: list[Tensor]) -> Tensor:
    """Squared output error by scale, ``[scale_rows, groups]``."""
    losses = []
    for rows in row_chunks(*matrix.shape):
        spread = spread_qparams(qparams, scheme, matrix.shape[1], rows)
        error = fake_quantize(matrix[rows], spread, scheme.stored) - matrix[rows]
        parts = torch.split(error, factors[0].shape[1], dim=1)
        losses.append(
            torch.stack(
                [(part @ x.t()).square().sum(dim=1) for part, x in zip(parts, factors, strict=True)], dim=1
            )
        )
    by_row = torch.cat(losses)
    return by_row.sum().view(1, 1) if scheme.granularity.kind == "tensor" else by_row
