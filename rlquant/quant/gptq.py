"""GPTQ: round the columns of a weight one after another, each time moving the rest to make up for the error.

The paper minimises ``E |W x - Q x|^2`` over codes Q with :mod:`~rlquant.quant.compensate`. Three things are
added, each of which saves a policy much of its reward:

- **The target is the float network's output.** The layers before are quantized already and give ``x'`` for
  ``x``; what is minimised is ``E |W x - Q x'|^2``. Its minimum without rounding is ``T = W + W D (H +
  damping)^-1`` with ``D = E (x - x') x'^T`` and ``H = E x' x'^T``, and rounding T with H minimises the rest.
  (Li et al. 2025, GPTAQ, arXiv:2504.02692, pose the same problem.)
- **The bias is a column that needs no rounding.** Eliminating it turns all moments into covariances, after
  which bias correction restores the mean. Layers without a bias keep plain moments.
- **Scales are searched.** Of eight fractions of the observer's range, each row takes the one of least loss
  after its rounding with compensation; in a layer of more than 512 rows, 128 of them first narrow the eight
  to two. Scales are those of T before rounding (static groups), which act-order needs.

H gets a share of its mean diagonal added: 0.01 times columns over calibration rows, at least 0.001. What few
samples say is trusted less. A column whose input was always zero is
rounded to nearest and neither gives nor takes compensation; the paper zeroes it, but a state that calibration
missed would then meet another policy. A row that came out worse than round-to-nearest keeps its nearest
codes.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from rlquant.quant.affine import QParams, dequantize, qparams_from_range
from rlquant.quant.compensate import Factor, round_with_compensation
from rlquant.quant.granularity import row_chunks
from rlquant.quant.moments import InputMoments
from rlquant.quant.notes import CalibrationWarning
from rlquant.quant.observers import weight_ranges
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import join_rows, nearest_codes, nearest_qparams, spread_qparams

__all__ = ["gptq"]

DAMPING = 0.01
LEAST_DAMPING = 0.001
FRACTIONS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SEARCH_ROWS = 512
SAMPLED_ROWS = 128
FINALISTS = 2
ROUNDED_TOGETHER = 2**25  # weights: 128 MiB in float32, of which rounding takes several times as much

Chosen = tuple[Tensor, QParams | None]


def gptq(matrix: Tensor, scheme: Scheme, moments: InputMoments | None, what: str) -> Chosen:
    """Codes ``[rows, columns]`` and qparams of a float32 weight whose inputs had these moments."""
    assert moments is not None
    pull = _pull(matrix, moments)
    gram = moments.gram[0]
    factor = Factor(gram, _damping(moments.count, len(gram), what), what)
    target = matrix if pull is None else matrix + factor.solve(pull)
    values, qparams = _best_scales(target, scheme, factor)
    nearest = nearest_qparams(matrix, scheme, what)
    chosen = (nearest_codes(values, qparams, scheme), qparams)
    fallback = (nearest_codes(matrix, nearest, scheme), nearest)
    return _better_rows(matrix, chosen, fallback, gram.to(torch.float32), pull, scheme)


def _pull(matrix: Tensor, moments: InputMoments) -> Tensor | None:
    """``W D``, float32 ``[rows, columns]``; D is given up, since H needs the memory. None where there is no D."""
    drift = moments.drift
    if drift is None:
        return None
    pull = torch.empty_like(matrix)
    for rows in row_chunks(*drift.shape[1:]):
        pull[:, rows] = matrix @ drift[0][:, rows].to(torch.float32)
    moments.forget_drift()
    return pull


def _damping(rows: int, columns: int, what: str) -> float:
    """A share of the mean diagonal by how scarce the rows are; says so where they are fewer than columns."""
    damping = min(1.0, max(LEAST_DAMPING, DAMPING * columns / rows))
    if rows >= columns:
        return damping
    warnings.warn(
        f"{what}: {rows} calibration rows do not determine the Hessian of {columns} columns; damping is "
        f"raised from {DAMPING:g} to {damping:.2g}. Calibrate with more data",
        CalibrationWarning,
        stacklevel=2,
    )
    return damping


def _best_scales(target: Tensor, scheme: Scheme, factor: Factor) -> Chosen:
    """Rounded values ``[rows, columns]`` and the qparams of each row's best fraction of its range."""
    if not scheme.stored.is_scaled:
        return round_with_compensation(target, None, scheme.stored, factor)[0], None
    low, high = weight_ranges(target, scheme.stored, scheme.granularity, scheme.observer)
    fractions = torch.tensor(FRACTIONS, device=target.device)
    if len(target) > SEARCH_ROWS:
        some = torch.linspace(0, len(target) - 1, SAMPLED_ROWS, device=target.device).long()
        sampled = (low, high) if len(low) == 1 else (low[some], high[some])
        losses = _tried(target[some], *sampled, scheme, factor, fractions)[1]
        fractions = fractions[losses.sum(dim=1).argsort()[:FINALISTS]]
    if len(low) == 1:
        return _best_of(target, low, high, scheme, factor, fractions)
    parts = [
        _best_of(target[rows], low[rows], high[rows], scheme, factor, fractions)
        for rows in row_chunks(len(target), target.shape[1], ROUNDED_TOGETHER)
    ]
    return parts[0] if len(parts) == 1 else join_rows(parts)


def _best_of(
    target: Tensor, low: Tensor, high: Tensor, scheme: Scheme, factor: Factor, fractions: Tensor
) -> Chosen:
    """Rounded values, and the qparams of the best fraction of each row, or of all where they share one scale."""
    values, losses = _tried(target, low, high, scheme, factor, fractions)
    if len(low) == 1:
        losses = losses.sum(dim=1, keepdim=True).expand_as(losses)
    best = losses.argmin(dim=0)
    chosen = fractions[best][: len(low), None]
    values = values[best, torch.arange(len(target), device=target.device)]
    return values, qparams_from_range(low * chosen, high * chosen, scheme.stored)


def _tried(
    target: Tensor, low: Tensor, high: Tensor, scheme: Scheme, factor: Factor, fractions: Tensor
) -> tuple[Tensor, Tensor]:
    """Values ``[fractions, rows, columns]`` and losses ``[fractions, rows]``, all rounded in one go."""
    rows, columns = target.shape
    shares = fractions[:, None, None]
    qparams = qparams_from_range(shares * low, shares * high, scheme.stored)

    def spread(values: Tensor) -> Tensor:
        every_row = values.expand(-1, rows, -1).reshape(len(fractions) * rows, -1)
        return scheme.granularity.expand(every_row, columns)

    point = None if qparams.zero_point is None else spread(qparams.zero_point)
    stacked = target.repeat(len(fractions), 1)
    values, losses = round_with_compensation(
        stacked, QParams(spread(qparams.scale), point), scheme.stored, factor
    )
    return values.view(-1, rows, columns), losses.view(-1, rows)


def _better_rows(
    matrix: Tensor, chosen: Chosen, fallback: Chosen, hessian: Tensor, pull: Tensor | None, scheme: Scheme
) -> Chosen:
    """Row by row, codes and qparams of less loss; all rows alike where they share one scale."""
    codes, qparams = chosen
    excess = _excess(matrix, chosen, fallback, hessian, pull, scheme)
    if scheme.granularity.kind == "tensor":
        return chosen if excess.sum() <= 0 else fallback
    worse = (excess > 0)[:, None]
    codes = torch.where(worse, fallback[0], codes)
    if qparams is None or fallback[1] is None:
        return codes, None
    scale = torch.where(worse, fallback[1].scale, qparams.scale)
    if qparams.zero_point is None or fallback[1].zero_point is None:
        return codes, QParams(scale)
    return codes, QParams(scale, torch.where(worse, fallback[1].zero_point, qparams.zero_point))


def _excess(
    matrix: Tensor, chosen: Chosen, fallback: Chosen, hessian: Tensor, pull: Tensor | None, scheme: Scheme
) -> Tensor:
    """How much larger ``E |W x - Q x'|^2`` is for the chosen Q than for the fallback, ``[rows]``.

    With their errors e and f, that is ``(e + f) H (e - f)^T + 2 (W D) (e - f)^T``.
    """
    excess = []
    for rows in row_chunks(*matrix.shape):
        values, nearest = (_decoded(each, scheme, rows) for each in (chosen, fallback))
        slope = (2.0 * matrix[rows] - values - nearest) @ hessian
        if pull is not None:
            slope += 2.0 * pull[rows]
        excess.append((slope * (nearest - values)).sum(dim=1))
    return torch.cat(excess)


def _decoded(chosen: Chosen, scheme: Scheme, rows: slice) -> Tensor:
    """The real values of some rows, float32 ``[n, columns]``."""
    codes, qparams = chosen
    if qparams is None:
        return scheme.stored.decode(codes[rows])
    return dequantize(codes[rows], spread_qparams(qparams, scheme, codes.shape[1], rows), scheme.stored)
