"""SmoothQuant: move the difficulty of quantizing from the inputs to the weights.

One grid for a whole activation leaves few steps to its quiet channels. Dividing channel j of the input by

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)   (equation 4)

and multiplying the weights by it evens the channels out; alpha says how far. Here alpha is chosen for each
layer from 0.1 to 0.9 by its output error with both weights and inputs rounded. The division is folded into
the layer before where that is exact, and kept as an explicit input scale otherwise.

Source: Xiao et al. 2022, arXiv:2211.10438.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rlquant.quant.bench import Bench
from rlquant.quant.moments import InputMoments
from rlquant.quant.scaling import scale_inputs_by_search_

__all__ = ["smoothing_factors", "smoothquant"]

ALPHAS = tuple(step / 10 for step in range(1, 10))


def smoothquant(bench: Bench) -> None:
    """Scale the input channels of every Linear and Conv2d on the bench."""
    scale_inputs_by_search_(bench, _candidates)


def smoothing_factors(largest_input: Tensor, largest_weight: Tensor, alpha: float) -> Tensor:
    """Equation 4: ``[channels]`` from the largest magnitudes of inputs and weights, ``[channels]`` each.

    A channel that was always zero, or whose weights are, gets the smallest factor of the others.
    """
    factors = largest_input.double() ** alpha / largest_weight.double() ** (1 - alpha)
    alive = (largest_input > 0) & (largest_weight > 0)
    if not bool(alive.any()):
        return factors.new_ones(len(factors))
    return factors.where(alive, factors[alive].min())


def _candidates(moments: InputMoments, largest_weight: Tensor, channels: int) -> Iterable[Tensor]:
    largest_input = moments.abs_max[0].view(channels, -1).amax(dim=1)
    return [smoothing_factors(largest_input, largest_weight, alpha) for alpha in ALPHAS]
