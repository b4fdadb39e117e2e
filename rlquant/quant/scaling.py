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
        consumers = [
            _Consumer(bench.weight_channels(twin, channels), twin.scheme, seen.rows[0]) for twin in twins
        ]
        largest = torch.stack([each.largest for each in consumers]).amax(dim=0)
        best = torch.ones(channels, device=largest.device)
        best_loss = sum(each.loss(best) for each in consumers)
        for factors in candidates(seen, largest, channels):
            scale = _normalised(factors)
            loss = sum(each.loss(scale) for each in consumers)
            if loss < best_loss:
                best, best_loss = scale, loss
        if bool((best != 1).any()):
            bench.scale(link, twins, best)


def _normalised(factors: Tensor) -> Tensor:
    factors = factors.to(torch.float32)
    factors = factors.clamp(min=float(factors.max()) * FAINT)
    return factors / factors.min()


class _Consumer:
    """A weight ``[out, channels, k]`` and rows ``[m, channels * k]`` that it reads."""

    def __init__(self, weight: Tensor, scheme: Scheme, rows: Tensor) -> None:
        self.matrix, self.scheme, self.rows = as_matrix(weight).to(torch.float32), scheme, rows
        self.largest = weight.abs().amax(dim=(0, 2))
        self.outputs = rows @ self.matrix.t()

    def loss(self, scale: Tensor) -> float:
        """Squared error of the output under factors ``[channels]``, everything rounded."""
        columns = scale.repeat_interleave(self.rows.shape[1] // len(scale))
        entering = _on_grid(self.rows / columns, self.scheme)
        scaled = self.matrix * columns
        qparams = nearest_qparams(scaled, self.scheme)
        assert qparams is not None
        total = 0.0
        for part in row_chunks(*scaled.shape):
            spread = spread_qparams(qparams, self.scheme, scaled.shape[1], part)
            restored = fake_quantize(scaled[part], spread, self.scheme.stored)
            error = entering @ restored.t() - self.outputs[:, part]
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
