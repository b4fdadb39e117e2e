"""Cross-layer equalization: give the channels between two layers equal weight ranges on both sides.

For a channel i between two layers with only ReLU-like layers between, let ``r1_i = max|W1_i,:|`` and ``r2_i =
max|W2_:,i|``. Dividing the first layer's row (and bias) by ``s_i = sqrt(r1_i / r2_i)`` and multiplying the
second's column by it makes both ranges ``sqrt(r1_i r2_i)`` (equation 11) and changes no output. A chain of
layers is swept until nothing moves.

It needs no data. With one scale per output channel the rows of the first layer do not matter to it; the
columns of the second still do.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.1.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rlquant.quant.bench import Bench
from rlquant.quant.granularity import as_matrix
from rlquant.quant.notes import CalibrationWarning

__all__ = ["cle", "equalizing_scale"]

SWEEPS = 50
SETTLED = 1e-3


def cle(bench: Bench) -> None:
    """Equalize every linked pair of a bench."""
    pairs = [link for link in bench.links if link.producer in bench.twins]
    if not pairs:
        warnings.warn(
            "cle found no two layers with only ReLU, LeakyReLU or pooling between them: nothing was equalized",
            CalibrationWarning,
            stacklevel=2,
        )
    for _ in range(SWEEPS):
        moved = 0.0
        for link in pairs:
            consumers = [bench.twins[name] for name in link.consumers]
            first = (
                as_matrix(bench.twins[link.producer].layer.get_parameter("weight").detach()).abs().amax(dim=1)
            )
            columns = [bench.weight_channels(twin, len(first)).abs().amax(dim=(0, 2)) for twin in consumers]
            scale = equalizing_scale(first, torch.stack(columns).amax(dim=0))
            bench.scale(link, consumers, scale)
            moved = max(moved, float(scale.log().abs().max()))
        if moved < SETTLED:
            return


def equalizing_scale(first: Tensor, second: Tensor) -> Tensor:
    """``sqrt(r1 / r2)`` from the ranges on both sides of each channel; 1 where a side is all zero."""
    usable = (first > 0) & (second > 0)
    ratio = torch.where(usable, first.double() / second.double().where(usable, 1.0), 1.0)
    return ratio.sqrt()
