"""Round to nearest (RTN): every weight takes the nearest code, independently of the others.

``rtn`` takes the ranges of the scheme's own observer. ``mse`` takes for every scale the range whose rounding
and clipping errors have the least sum of squares (optimal clipping; Banner et al. 2019, arXiv:1810.05723),
searched over 80 fractions of the min-max range.
"""

from __future__ import annotations

from torch import Tensor

from rlquant.quant.affine import QParams
from rlquant.quant.moments import InputMoments
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import nearest_codes, nearest_qparams

__all__ = ["round_to_nearest", "round_with_best_range"]


def round_to_nearest(
    matrix: Tensor, scheme: Scheme, moments: InputMoments | None, what: str
) -> tuple[Tensor, QParams | None]:
    """Codes ``[rows, columns]`` and qparams of a float weight, with the scheme's observer."""
    qparams = nearest_qparams(matrix, scheme, what)
    return nearest_codes(matrix, qparams, scheme), qparams


def round_with_best_range(
    matrix: Tensor, scheme: Scheme, moments: InputMoments | None, what: str
) -> tuple[Tensor, QParams | None]:
    """The same with the range of least squared error."""
    qparams = nearest_qparams(matrix, scheme, what, "mse")
    return nearest_codes(matrix, qparams, scheme), qparams
