"""HQQ: half-quadratic quantization, which needs no data.

A few large weights should not set the step for all others: the error is measured in an l_p norm with p < 1,
which forgives them. With an auxiliary error ``e`` the problem

    min over scale s and zero point z of  |W - Q(W)|_p^p,   Q(W) = s (round(W / s) + z) - s z  on the grid

splits into two easy steps, taken in turn:

    e <- shrink(W - Q(W)),   shrink(x) = sign(x) relu(|x| - |x|^(p-1) / beta)
    s, z <- least squares fit of the codes to W - e,   beta <- kappa beta

HQQ itself fits a fractional zero point at a fixed scale. A zero point here lies on the grid, so that zero
stays exact, and symmetric schemes have none; so the scale is fitted too. Errors are measured in steps of the
scale, which makes the result the same for ``W`` and ``c W``. The best of all iterates is kept; the first is
min-max.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs), with
its p = 0.7, beta = 10, kappa = 1.01 and 20 iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlquant.quant.affine import QParams, fake_quantize, qparams_from_range
from rlquant.quant.formats import Format
from rlquant.quant.granularity import CACHED_ELEMENTS, row_chunks
from rlquant.quant.moments import InputMoments
from rlquant.quant.ranges import minmax
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import nearest_codes

__all__ = ["hqq"]

P = 0.7
BETA = 10.0
KAPPA = 1.01
ITERATIONS = 20


def hqq(
    matrix: Tensor, scheme: Scheme, moments: InputMoments | None, what: str
) -> tuple[Tensor, QParams | None]:
    """Codes ``[rows, columns]`` and qparams of a float weight."""
    scale_rows = scheme.granularity.scale_shape(*matrix.shape)[0]
    parts = []
    for blocks in scheme.granularity.blocks(matrix):
        chunks = [
            _fit(blocks[rows], scheme.stored)
            for rows in row_chunks(len(blocks), blocks.shape[1], CACHED_ELEMENTS)
        ]
        parts.append([torch.cat(side).view(scale_rows, -1) for side in zip(*chunks, strict=True)])
    scale, zero_point = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    qparams = QParams(scale, None if scheme.stored.signed else zero_point.to(torch.int32))
    return nearest_codes(matrix, qparams, scheme), qparams


def _fit(blocks: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point (0 for symmetric maps) of each row of ``[blocks, n]``: ``[blocks, 1]``."""
    low, high = minmax(blocks, fmt)
    start = qparams_from_range(low[:, None], high[:, None], fmt)
    scale = start.scale
    zero_point = torch.zeros_like(scale) if start.zero_point is None else start.zero_point.to(scale.dtype)
    best, best_loss = (scale, zero_point), torch.full_like(scale, torch.inf)
    beta = BETA
    for _ in range(ITERATIONS):
        restored = fake_quantize(blocks, QParams(scale, None if fmt.signed else zero_point), fmt)
        steps = (blocks - restored) / scale
        size = steps.abs()
        slope = size.clamp(min=1e-30).pow(P - 1)  # infinite at zero, which the shrinking leaves at zero
        loss = (size * slope).sum(dim=1, keepdim=True) * scale.pow(P)
        better = loss < best_loss
        best = (torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1]))
        best_loss = torch.minimum(loss, best_loss)
        target = blocks - scale * steps.sign() * (size - slope / beta).clamp(min=0.0)
        scale, zero_point = _least_squares(restored / scale, target, scale, zero_point, fmt)
        beta *= KAPPA
    return best


def _least_squares(
    grid: Tensor, target: Tensor, scale: Tensor, zero_point: Tensor, fmt: Format
) -> tuple[Tensor, Tensor]:
    """The map under which the present codes, ``grid`` away from zero, fit the target best."""
    if not fmt.signed:
        codes = grid + zero_point
        zero_point = (codes - target / scale).mean(dim=1, keepdim=True).round().clamp(0, fmt.max)
        grid = codes - zero_point
    power = grid.square().sum(dim=1, keepdim=True)
    fitted = (grid * target).sum(dim=1, keepdim=True) / power
    return torch.where((power > 0) & (fitted > 0), fitted, scale), zero_point
