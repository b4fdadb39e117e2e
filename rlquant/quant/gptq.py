"""GPTQ: round the columns of a weight one after another, each time moving the rest to make up for the error.

A layer's loss on calibration inputs ``x`` is ``E |W x - Q x|^2 = sum_r e_r H e_r^T`` with ``e_r`` a row of
``W - Q`` and ``H = E x x^T``. Rows are independent. When column ``q`` is rounded, the optimal change of the
columns not yet rounded is (equation 2 of the paper)

    delta = -(w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_q:

where F are those columns. All that is needed of the shrinking inverses is the upper Cholesky factor U of
``H^-1 = U^T U``: the change in column j is ``-(w_q - quant(w_q)) / U_qq * U_qj``. Columns are taken in blocks
of 128, with the later columns updated once a block (lazy batch updates), and in the order of decreasing
``H_jj`` (act-order), so that the most used inputs are rounded while there is most left to compensate with.
Scales are those of the unmodified weight (static groups): act-order would otherwise scatter groups.

H gets ``damping * mean(diag H)`` added to its diagonal: 0.01, more where samples are few. A column whose input
was always zero is rounded to nearest and left out. A row that came out worse than round-to-nearest, which the
greedy order does not exclude, keeps its nearest codes.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rlquant.quant.affine import QParams, dequantize, fake_quantize
from rlquant.quant.bench import CalibrationWarning
from rlquant.quant.granularity import row_chunks
from rlquant.quant.moments import InputMoments
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import nearest_codes, nearest_qparams, spread_qparams

__all__ = ["compensated_codes", "gptq"]

DAMPING = 0.01
BLOCK = 128


def gptq(
    matrix: Tensor, scheme: Scheme, moments: InputMoments | None, what: str
) -> tuple[Tensor, QParams | None]:
    """Codes ``[rows, columns]`` and qparams of a float weight whose inputs had these moments."""
    assert moments is not None
    qparams = nearest_qparams(matrix, scheme, what)
    damping = DAMPING
    if moments.count < matrix.shape[1]:
        damping = min(1.0, DAMPING * matrix.shape[1] / max(1, moments.count))
        warnings.warn(
            f"{what}: {moments.count} calibration rows do not determine the Hessian of {matrix.shape[1]} columns; "
            f"damping is raised from {DAMPING:g} to {damping:.2g}. Calibrate with more data",
            CalibrationWarning,
            stacklevel=2,
        )
    return compensated_codes(matrix, moments.gram[0], qparams, scheme, damping=damping, what=what), qparams


def compensated_codes(
    matrix: Tensor,
    hessian: Tensor,
    qparams: QParams | None,
    scheme: Scheme,
    *,
    damping: float = DAMPING,
    act_order: bool = True,
    block: int = BLOCK,
    what: str = "the weight",
) -> Tensor:
    """Codes of a weight at given qparams, in the format's code dtype.

    Args:
        matrix: float weight ``[rows, columns]``.
        hessian: ``E x x^T`` of its inputs, ``[columns, columns]``, without damping.
        qparams: of the scheme's scale shape; None for plain casts.
        scheme: its stored format has the codes.
        damping: share of the mean diagonal that is added to the diagonal.
        act_order: take columns by decreasing diagonal of the Hessian, or as they come.
        block: columns between two updates of all that follow; changes nothing but speed.
        what: named in warnings.
    """
    columns = matrix.shape[1]
    order = torch.arange(columns, device=matrix.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping, what)
    spread = None if qparams is None else _by_column(spread_qparams(qparams, scheme, columns), order)
    weight = matrix.detach().to(torch.float32).t()[order].contiguous()  # rows are columns of the matrix
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(weight[start:stop])
        for i in range(start, stop):
            rounded = _round(weight[i], None if spread is None else _column(spread, i), scheme)
            error = (weight[i] - rounded) / factor[i, i]
            weight[i + 1 : stop].sub_(factor[i, i + 1 : stop, None] * error)
            weight[i] = rounded
            errors[i - start] = error
        weight[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1.0)
    restored = torch.empty_like(weight)
    restored[order] = weight
    codes = nearest_codes(restored.t().contiguous(), qparams, scheme)
    return _better_rows(matrix, codes, hessian, qparams, scheme)


def inverse_factor(hessian: Tensor, damping: float, what: str) -> Tensor:
    """Upper triangular U with ``U^T U = (H + damping * mean(diag H) * I)^-1``, float32.

    Columns with a zero diagonal are cut loose with a one there. Damping grows tenfold until H is positive
    definite, which is said in a CalibrationWarning.
    """
    hessian = hessian.to(torch.float64)
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones_like(diagonal[0])
    given = damping
    while True:
        damped = hessian + torch.diag(torch.where(dead, mean, damping * mean))
        # With J the reversal, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and U = R^-1:
        # one factorization and one solve, where inverting H first takes two and ten times as long.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        damping *= 10
    if damping != given:
        warnings.warn(
            f"{what}: the Hessian of the calibration inputs is not positive definite; damping is raised from "
            f"{given:g} to {damping:g}",
            CalibrationWarning,
            stacklevel=2,
        )
    identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    factor: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
    return factor.to(torch.float32)


def _by_column(spread: QParams, order: Tensor) -> QParams:
    """Qparams ``[1 or rows, 1 or columns]`` transposed, with their columns in ``order``."""

    def arrange(values: Tensor) -> Tensor:
        return (values[:, order] if values.shape[1] > 1 else values).t().contiguous()

    return QParams(arrange(spread.scale), None if spread.zero_point is None else arrange(spread.zero_point))


def _column(spread: QParams, i: int) -> QParams:
    i = min(i, len(spread.scale) - 1)
    return QParams(spread.scale[i], None if spread.zero_point is None else spread.zero_point[i])


def _round(column: Tensor, qparams: QParams | None, scheme: Scheme) -> Tensor:
    """A column ``[rows]`` rounded to the nearest values."""
    return scheme.stored.cast(column) if qparams is None else fake_quantize(column, qparams, scheme.stored)


def _better_rows(
    matrix: Tensor, codes: Tensor, hessian: Tensor, qparams: QParams | None, scheme: Scheme
) -> Tensor:
    """Row by row the codes of less loss: these or the nearest ones."""
    nearest = nearest_codes(matrix, qparams, scheme)
    hessian = hessian.to(torch.float32)
    for rows in row_chunks(*matrix.shape):
        worse = row_losses(matrix[rows], codes[rows], hessian, qparams, scheme, rows) > row_losses(
            matrix[rows], nearest[rows], hessian, qparams, scheme, rows
        )
        codes[rows] = torch.where(worse[:, None], nearest[rows], codes[rows])
    return codes


def row_losses(
    part: Tensor, codes: Tensor, hessian: Tensor, qparams: QParams | None, scheme: Scheme, rows: slice
) -> Tensor:
    """``e H e^T`` of each row, float32 ``[rows]``."""
    if qparams is None:
        restored = scheme.stored.decode(codes)
    else:
        restored = dequantize(codes, spread_qparams(qparams, scheme, part.shape[1], rows), scheme.stored)
    error = part.to(torch.float32) - restored
    return ((error @ hessian) * error).sum(dim=1)
