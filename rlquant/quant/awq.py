"""AWQ: protect the weights that loud inputs multiply, by scaling their channel up before rounding.

The error of a rounded weight reaches the output through its input. Scaling channel j by ``s_j > 1`` shrinks
its relative rounding error by about ``s_j`` while the step of its group hardly grows. The scale follows the
mean magnitude of the inputs, with one exponent per layer,

    s_j = (E |x_j|)^alpha,   alpha in {0, 1/20, ..., 1}   (equation 5)

chosen by the output error. It is folded into the layer before where that is exact, and kept as an explicit
input scale otherwise. Then the ranges of the weights are clipped to the least output error (the rule
``clip``).

Source: Lin et al. 2023, arXiv:2306.00978, section 3.2 and the clipping search of its code.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlquant.quant.bench import Bench
from rlquant.quant.moments import InputMoments
from rlquant.quant.scaling import scale_inputs_by_search_

__all__ = ["awq"]

STEPS = 20


def awq(bench: Bench) -> None:
    """Scale the input channels of every Linear and Conv2d on the bench."""
    scale_inputs_by_search_(bench, _candidates)


def _candidates(moments: InputMoments, largest_weight: Tensor, channels: int) -> Iterable[Tensor]:
    magnitude = moments.abs_mean[0].view(channels, -1).mean(dim=1)
    alive = magnitude > 0
    if not bool(alive.any()):
        return []
    # What was always zero, such as an outlier that is split off, counts as the quietest of the others.
    magnitude = magnitude.where(alive, magnitude[alive].min())
    return [magnitude ** (step / STEPS) for step in range(1, STEPS + 1)]
