"""Rounding with compensation: the inner loop of GPTQ, at given scales.

The loss of a row with error ``e`` on inputs ``x`` is ``e H e^T`` with ``H = E x x^T``. When column ``q`` is
rounded, the change of the columns F not yet rounded that costs least is (equation 2 of the paper)

    delta = -(w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_q:

All that is needed of the shrinking inverses is the upper triangular U with ``U^T U = H^-1``: column j changes
by ``-(w_q - quant(w_q)) / U_qq * U_qj``, and the loss is the sum of ``((w_q - quant(w_q)) / U_qq)^2`` over
all columns. Columns are taken in blocks, with the later columns updated once a block (lazy batch updates).

Source: Frantar et al. 2022, arXiv:2210.17323, sections 3.2 to 3.4.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rlquant.devices import has_triton
from rlquant.quant.affine import QParams, fake_quantize
from rlquant.quant.formats import Format
from rlquant.quant.granularity import row_chunks
from rlquant.quant.notes import CalibrationWarning

__all__ = ["BLOCK", "DOUBLE_COLUMNS", "Factor", "inverse_factor", "round_with_compensation"]

BLOCK = 128
STEP = 512  # columns of the factorization at a time
DOUBLE_COLUMNS = 8192  # beyond, float64 (2.9 GB for a matrix of 18,944 columns) would not fit beside the rest


class Factor:
    """The order of the columns, and the factor of the inverse Hessian in it.

    - ``order``: int64 ``[columns]``, by decreasing diagonal (act-order), so that the most used inputs are
      rounded while there is most left to compensate with; or as they come
    - ``upper``: float32 ``[columns, columns]``
    """

    def __init__(self, hessian: Tensor, damping: float, what: str, act_order: bool = True) -> None:
        """From ``E x x^T`` ``[columns, columns]``; a share ``damping`` of its mean diagonal is added."""
        self.order = torch.arange(len(hessian), device=hessian.device)
        if act_order:
            self.order = hessian.diagonal().argsort(descending=True, stable=True)
        self.upper = inverse_factor(hessian, self.order, damping, what)

    def solve(self, rows: Tensor) -> Tensor:
        """``rows (H + damping)^-1``: float32 ``[n, columns]``, columns in their own order."""
        solved = torch.empty_like(rows)
        solved[:, self.order] = (rows[:, self.order] @ self.upper.t()) @ self.upper
        return solved


def inverse_factor(hessian: Tensor, order: Tensor, damping: float, what: str) -> Tensor:
    """Upper triangular U with ``U^T U = (H + damping * mean(diag H) * I)^-1``, float32, of H in the given order.

    Columns with a zero diagonal are cut loose with the mean there. Damping grows tenfold until H is positive
    definite, which is said in a CalibrationWarning. Up to ``DOUBLE_COLUMNS`` columns are computed in float64.
    """
    # With J the reversal, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and U = R^-1 = J L^-1 J:
    # one factorization and one inverse, where inverting H first takes two and ten times as long.
    backwards = order.flip(0)
    given = damping
    while True:
        lower = _damped(hessian, backwards, damping)
        if _cholesky_(lower):
            break
        damping *= 10
    if damping != given:
        warnings.warn(
            f"{what}: the Hessian of the calibration inputs is not positive definite; damping is raised from "
            f"{given:g} to {damping:g}",
            CalibrationWarning,
            stacklevel=2,
        )
    return _inverse_lower_(lower).to(torch.float32).flip(0, 1).contiguous()


def _damped(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    double = len(hessian) <= DOUBLE_COLUMNS
    damped = torch.empty(
        hessian.shape, dtype=torch.float64 if double else torch.float32, device=hessian.device
    )
    for rows in row_chunks(*hessian.shape):  # one index for both dimensions makes two matrices of int64
        damped[rows] = hessian.index_select(0, order[rows]).index_select(1, order)
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones_like(diagonal[0])
    diagonal += torch.where(dead, mean, damping * mean)
    return damped


def _cholesky_(matrix: Tensor) -> bool:
    """Replace a symmetric matrix by its lower Cholesky factor, by blocks of columns; False where it is not positive
    definite. A library's own factorization of 18,944 columns asks for 2.9 GB more."""
    for start in range(0, len(matrix), STEP):
        stop = start + STEP
        corner, failed = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if failed:
            return False
        matrix[start:stop, start:stop] = corner
        matrix[start:stop, stop:] = 0
        below = matrix[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
        for at in range(stop, len(matrix), STEP):  # the lower triangle alone
            matrix[at:, at : at + STEP] -= below[at - stop :] @ below[at - stop : at - stop + STEP].mT
    return True


def _inverse_lower_(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, in its place, by blocks of rows: less work than a solve for the
    identity."""
    for start in range(0, len(lower), STEP):
        rows = slice(start, start + STEP)
        corner = lower[rows, rows]
        identity = torch.eye(len(corner), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(corner, identity, upper=False)
        lower[rows, :start] = -inverse @ (lower[rows, :start] @ lower[:start, :start])
        lower[rows, rows] = inverse
    return lower


def round_with_compensation(
    matrix: Tensor, spread: QParams | None, fmt: Format, factor: Factor, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Round a weight column by column.

    Args:
        matrix: float32 ``[rows, columns]``.
        spread: ``[rows, 1]`` or ``[rows, columns]``; None for plain casts.
        fmt: has the values.
        factor: of the inputs' Hessian.
        block: columns between two updates of all that follow; changes nothing but speed.

    Returns:
        The real values of the chosen codes, float32 ``[rows, columns]``, and each row's damped loss
        ``[rows]``.
    """
    order, upper = factor.order, factor.upper
    spread = None if spread is None else _by_column(spread, order)
    weight = matrix.t()[order].contiguous()  # row i is the i-th column to be rounded
    loss = torch.zeros(len(matrix), device=matrix.device)
    for start in range(0, len(order), block):
        stop = min(start + block, len(order))
        with _serial():
            errors = _round_block(weight[start:stop], start, spread, upper, fmt)
            loss += errors.square().sum(dim=0)
        weight[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
    values = torch.empty_like(weight)
    values[order] = weight
    return values.t().contiguous(), loss


def _round_block(weight: Tensor, start: int, spread: QParams | None, upper: Tensor, fmt: Format) -> Tensor:
    """Round a block ``[block, rows]`` in place; its errors in units of the factor's diagonal."""
    if weight.is_cuda and spread is not None and fmt.kind == "int" and has_triton():
        from rlquant.quant.compensate_cuda import round_block

        return round_block(weight, start, spread, upper, fmt)
    errors = torch.empty_like(weight)
    for i in range(len(weight)):
        j = start + i
        rounded = fmt.cast(weight[i]) if spread is None else fake_quantize(weight[i], _column(spread, j), fmt)
        error = (weight[i] - rounded) / upper[j, j]
        weight[i + 1 :].sub_(upper[j, j + 1 : start + len(weight), None] * error)
        weight[i] = rounded
        errors[i] = error
    return errors


@contextmanager
def _serial() -> Iterator[None]:
    """One thread: on a busy machine, waking another takes a thousand times as long as a column."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_column(spread: QParams, order: Tensor) -> QParams:
    """Qparams ``[1 or rows, 1 or columns]`` transposed, with their columns in ``order``."""

    def arrange(values: Tensor) -> Tensor:
        return (values[:, order] if values.shape[1] > 1 else values).t().contiguous()

    return QParams(arrange(spread.scale), None if spread.zero_point is None else arrange(spread.zero_point))


def _column(spread: QParams, i: int) -> QParams:
    i = min(i, len(spread.scale) - 1)
    return QParams(spread.scale[i], None if spread.zero_point is None else spread.zero_point[i])
