"""The search that AWQ and SmoothQuant share: a factor per input channel, tried by the error it leaves.

For positive ``s`` per input channel, ``W x = (W S)(S^-1 x)``: the weights of a channel grow by ``s`` and its
inputs shrink. What changes is the rounding. A candidate's loss is the squared output error, on sampled
inputs, of the scaled weight rounded to nearest and the scaled input on its activation grid. ``s = 1`` is
always a candidate.

Factors are divided by the smallest, so that no input grows: a grid that covered the input still does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from rlquant.quant.affine import fake_quantize, qparams_from_range
from rlquant.quant.bench import Bench
from rlquant.quant.granularity import as_matrix, row_chunks
from rlquant.quant.moments import SAMPLE_ROWS, InputMoments
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import nearest_qparams, spread_qparams

__all__ = ["ChannelSizes", "scale_inputs_by_search_"]

ChannelSizes = Callable[[InputMoments, Tensor, int], Iterable[Tensor]]
FAINT = 1e-4  # a channel fainter than this share of the loudest counts as that loud


def scale_inputs_by_search_(bench: Bench, candidates: ChannelSizes) -> None:
    """Scale the inputs of every layer that allows it by the best of its candidates.

    ``candidates(moments, largest_weight [channels], channels)`` gives factors ``[channels]``, up to a
    constant.
    """
    groups = [(link, twins) for link, twins in bench.consumer_groups() if all(t.rescalable for t in twins)]
    moments = bench.moments((twin.name for _, twins in groups for twin in twins), sample=SAMPLE_ROWS)
    for link, twins in groups:
        channels = bench.channels(link, twins)
        seen = moments[twins[0].name].by_matrix["packed"]
        if seen.count == 0:
            continue
        weights = [bench.weight_channels(twin, channels) for twin in twins]
        largest = torch.stack([weight.abs().amax(dim=(0, 2)) for weight in weights]).amax(dim=0)
        expected = [seen.rows[0] @ as_matrix(weight).to(torch.float32).t() for weight in weights]
        best = torch.ones(channels, device=largest.device)
        best_loss = _loss(weights, seen.rows[0], expected, best, bench.scheme)
        for factors in candidates(seen, largest, channels):
            scale = _normalised(factors)
            loss = _loss(weights, seen.rows[0], expected, scale, bench.scheme)
            if loss < best_loss:
                best, best_loss = scale, loss
        if bool((best != 1).any()):
            bench.scale(link, twins, best)


def _normalised(factors: Tensor) -> Tensor:
    factors = factors.to(torch.float32)
    factors = factors.clamp(min=float(factors.max()) * FAINT)
    return factors / factors.min()


def _loss(
    weights: list[Tensor], rows: Tensor, expected: list[Tensor], scale: Tensor, scheme: Scheme
) -> float:
    """Squared output error of weights ``[out, channels, k]`` on rows ``[m, channels * k]`` under a scale."""
    columns = scale.repeat_interleave(rows.shape[1] // len(scale))
    entering = _on_grid(rows / columns, scheme)
    total = 0.0
    for weight, outputs in zip(weights, expected, strict=True):
        scaled = as_matrix(weight).to(torch.float32) * columns
        qparams = nearest_qparams(scaled, scheme)
        assert qparams is not None
        for part in row_chunks(*scaled.shape):
            spread = spread_qparams(qparams, scheme, scaled.shape[1], part)
            restored = fake_quantize(scaled[part], spread, scheme.stored)
            error = entering @ restored.t() - outputs[:, part]
            total += float(error.square().sum(dtype=torch.float64))
    return total


def _on_grid(rows: Tensor, scheme: Scheme) -> Tensor:
    """Rows as the activation quantizer gives them, its range taken from the sample (or from each row)."""
    if scheme.activations is None:
        return rows
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    if not scheme.dynamic:
        low, high = low.min(), high.max()
    return fake_quantize(rows, qparams_from_range(low, high, scheme.activations), scheme.activations)
