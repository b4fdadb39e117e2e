"""Affine maps between real values and the grid of a format: ``x ~ scale * (q - zero_point)``.

A signed format stands for a symmetric map: no zero point, and the grid is cut to ``-max .. max`` (``-127 ..
127`` for int8, not ``-128``) so that negating a weight negates its code. An unsigned format stands for an
asymmetric map with a zero point on the grid, so that real zero is exact: zero padding and ReLU lose nothing.

The arithmetic is float32, multiplies by ``1 / scale``, rounds half to even and then adds the zero point: the
order in which ``torch.fake_quantize_per_tensor_affine`` and integer runtimes compute, so results agree to the
bit. Source: Jacob et al. 2018 (arXiv:1712.05877); Nagel et al. 2021 (arXiv:2106.08295), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.quant.formats import Format

__all__ = ["QParams", "dequantize", "fake_quantize", "finite_extremes", "qparams_from_range", "quantize"]

_TINY = torch.finfo(torch.float32).tiny  # the smallest scale whose inverse is finite


@dataclass(frozen=True)
class QParams:
    """``scale``: float32, positive. ``zero_point``: int32 of the same shape, None for a symmetric map.

    Both broadcast against the tensor they quantize.
    """

    scale: Tensor
    zero_point: Tensor | None = None


def finite_extremes(x: Tensor, what: str) -> Tensor:
    """Smallest and largest value of ``x``, float32 ``[2]``. InputError names ``what`` for NaN and Inf."""
    if x.numel() == 0:
        raise InputError(f"{what} is empty (shape {tuple(x.shape)}); quantization needs at least one number")
    # The extremes propagate NaN and Inf and need no mask of x's size.
    extremes = torch.stack(torch.aminmax(x.detach())).to(torch.float32)
    if not extremes.isfinite().all():
        raise InputError(f"{what} holds NaN or Inf; quantization needs finite numbers")
    return extremes


def qparams_from_range(low: Tensor, high: Tensor, fmt: Format) -> QParams:
    """The map that covers ``[low, high]`` and zero: float32 tensors of one shape -> QParams of that shape.

    An all-zero range gets scale 1. NaN in a range gives a NaN scale: callers check with
    :func:`finite_extremes` where the data comes from outside.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    if fmt.signed:
        scale = torch.maximum(high, -low) / fmt.max
        return QParams(_usable(scale))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = _usable(high / fmt.max - low / fmt.max)  # divided first: the difference could overflow
    zero_point = (-low * (1.0 / scale)).round_().clamp_(0, fmt.max)
    return QParams(scale, zero_point.to(torch.int32))


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.clamp(min=_TINY))


def quantize(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """Codes of ``x`` on the grid, in ``fmt.code_dtype`` and x's shape. Raises InputError for NaN in ``x``."""
    return fmt.encode(_to_grid(x, qparams, fmt))


def dequantize(codes: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """The real values of ``codes``: float32 of the same shape."""
    return _from_grid(fmt.decode(codes), qparams)


def fake_quantize(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """``dequantize(quantize(x))`` without forming codes: float32 of x's shape; NaN stays NaN."""
    grid = _to_grid(x, qparams, fmt)
    return _from_grid(grid if fmt.kind == "int" else fmt.cast(grid), qparams)


def _to_grid(x: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    """``x`` in units of the scale, clamped to the grid; on a grid point already where fmt is an integer."""
    grid = x.to(torch.float32) * (1.0 / qparams.scale)
    if fmt.kind == "int":
        grid = grid.round_()
    if qparams.zero_point is not None:
        return grid.add_(qparams.zero_point).clamp_(0, fmt.max)
    return grid.clamp_(-fmt.max, fmt.max)


def _from_grid(grid: Tensor, qparams: QParams) -> Tensor:
    if qparams.zero_point is not None:
        grid = grid - qparams.zero_point
    return grid * qparams.scale
