"""Fake quantization with a learned grid: LSQ for weights, LSQ+ for activations.

The forward pass is the arithmetic of ``affine.fake_quantize``, so what is trained is what is stored. With
``v = x / scale`` and grid bounds ``low .. high`` (already shifted by the zero point), the backward pass is

=================== ====================== ===================== =========================
..                   low <= v <= high       v < low               v > high
=================== ====================== ===================== =========================
d out / d x          1                      0                     0
d out / d scale      round(v) - v           low                   high
d out / d zero_point 0                      -scale                -scale
=================== ====================== ===================== =========================

(Esser et al. 2020, arXiv:1902.08153, equations 3 and 5, for the scale; Bhalgat et al. 2020, arXiv:2004.09576,
equation 5, for the offset ``-scale * zero_point``.) The bounds belong to the inside, so that the exact zeros of
a ReLU pull on no zero point. Scale and zero point gradients are multiplied by ``1 / sqrt(n * high)``, n the
number of values that share a scale in one sample.

What is learned is the scale's logarithm, which keeps it positive and makes an optimiser's step a relative one
whatever the magnitude of the tensor (Jain et al. 2020, arXiv:1903.08066), and the zero point as a share of the
grid. The zero point is rounded in every forward pass, the gradient going straight through: real zero stays
exactly representable during training and nothing moves when training ends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.quant.activations import DynamicQuantizer, StaticQuantizer
from rlquant.quant.affine import QParams, finite_extremes, qparams_from_range, quantize
from rlquant.quant.formats import Format
from rlquant.quant.granularity import as_matrix
from rlquant.quant.observers import weight_qparams
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import QuantizedWeight

__all__ = ["LearnedActivation", "LearnedWeight", "RowWiseActivation", "learned_fake_quantize"]


class _LearnedGrid(torch.autograd.Function):
    """``fake_quantize`` with gradients for the scale and the zero point."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, gradient_scale: float
    ) -> Tensor:
        low, high = _bounds(zero_point, fmt)
        position = x * (1.0 / scale)
        grid = position.round().clamp_(low, high)
        ctx.save_for_backward(position, grid, scale, *(() if zero_point is None else (low, high)))
        ctx.limits = (low, high) if zero_point is None else None
        ctx.gradient_scale = gradient_scale
        return grid * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        position, grid, scale, *bounds = ctx.saved_tensors
        low, high = ctx.limits or bounds
        inside = grad * ((position >= low) & (position <= high))
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            # grid - position inside and the bound itself outside, summed over what shares the scale
            pulled = torch.addcmul(grad * grid, inside, position, value=-1.0)
            grad_scale = pulled.sum_to_size(scale.shape) * ctx.gradient_scale
        if ctx.needs_input_grad[2]:
            grad_zero = ((inside - grad) * scale).sum_to_size(scale.shape) * ctx.gradient_scale
        return inside, grad_scale, grad_zero, None, None


def _bounds(zero_point: Tensor | None, fmt: Format) -> tuple[Any, Any]:
    """The ends of the grid with zero at zero: numbers, or tensors in the shape of the zero point."""
    if zero_point is None:
        return -fmt.max, fmt.max
    rounded = zero_point.round().clamp_(0, fmt.max)
    return -rounded, fmt.max - rounded


def learned_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: Format, gradient_scale: float = 1.0
) -> Tensor:
    """``x`` on the grid of ``fmt``, differentiable in the tensor, its scale and its zero point.

    Args:
        x: float32, any shape.
        scale: positive, broadcasting against ``x``.
        zero_point: real-valued, of the scale's shape, rounded here; None for a signed (symmetric) format.
        fmt: an integer format, unsigned where there is a zero point.
        gradient_scale: multiplies the gradients of scale and zero point.

    Returns:
        Float32 of x's shape.
    """
    result: Tensor = _LearnedGrid.apply(x, scale, zero_point, fmt, gradient_scale)  # type: ignore[no-untyped-call]
    return result


class _LearnedGridModule(nn.Module):
    """Holds ``log_scale`` and, for unsigned formats, ``zero_share = zero_point / fmt.max``."""

    zero_share: nn.Parameter | None

    def __init__(self, fmt: Format, shape: tuple[int, ...]) -> None:
        super().__init__()
        if fmt.kind != "int":
            raise InputError(f"a learned scale needs an integer format of 2 to 16 bits, not {fmt.name}")
        self.fmt = fmt
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.zero_share = None if fmt.signed else nn.Parameter(torch.zeros(shape))
        self.quantizing = True

    def set(self, qparams: QParams) -> None:
        """Start from these qparams, of the shape of the scale."""
        with torch.no_grad():
            self.log_scale.copy_(qparams.scale.log())
            if self.zero_share is not None:
                assert qparams.zero_point is not None
                self.zero_share.copy_(qparams.zero_point / self.fmt.max)

    @torch.no_grad()
    def qparams(self) -> QParams:
        """The qparams of the forward pass, to the bit."""
        if self.zero_share is None:
            return QParams(self.log_scale.exp())
        zero_point = (self.zero_share * self.fmt.max).round().clamp(0, self.fmt.max)
        return QParams(self.log_scale.exp(), zero_point.to(torch.int32))

    def freeze(self) -> None:
        """Stop learning the grid."""
        self.log_scale.requires_grad_(False)
        if self.zero_share is not None:
            self.zero_share.requires_grad_(False)

    def _gradient_scale(self, values: int) -> float:
        return float(max(1.0, values * self.fmt.max) ** -0.5)

    def get_extra_state(self) -> bool:
        """Whether the grid is in use, so that a checkpoint of a delayed training resumes as it was."""
        return self.quantizing

    def set_extra_state(self, state: bool) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.quantizing = bool(state)


class LearnedWeight(_LearnedGridModule):
    """A trainable weight under a scheme; stands where :class:`QuantizedWeight` will stand.

    Parameters: ``weight``, the float layer's own parameter; ``log_scale`` float32 ``[scale_rows, groups]``;
    ``zero_share`` of that shape for asymmetric schemes.
    """

    def __init__(self, weight: nn.Parameter, scheme: Scheme, observer: str, what: str) -> None:
        columns = as_matrix(weight).shape
        super().__init__(scheme.stored, scheme.granularity.scale_shape(*columns))
        self.scheme = scheme
        self.observer = observer
        self.what = what
        self.caches = True
        self.to(weight.device)
        self.weight = weight
        self.reset_grid()

    def reset_grid(self) -> None:
        """Choose the grid anew from the weight as it is."""
        self.set(weight_qparams(self.weight, self.fmt, self.scheme.granularity, self.observer, self.what))

    def cached(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as it will be stored, of the weight's shape, differentiable."""
        if not self.quantizing:
            return self.weight.to(dtype)
        matrix = as_matrix(self.weight)
        columns = matrix.shape[1]
        expand = self.scheme.granularity.expand
        zero_point = None if self.zero_share is None else expand(self.zero_share * self.fmt.max, columns)
        scale = expand(self.log_scale.exp(), columns)
        gradient_scale = self._gradient_scale(matrix.numel() // self.log_scale.numel())
        grid = learned_fake_quantize(matrix, scale, zero_point, self.fmt, gradient_scale)
        return grid.view(self.weight.shape).to(dtype)

    @torch.no_grad()
    def stored(self) -> QuantizedWeight:
        """The packed weight; its ``dequantize()`` equals :meth:`cached` to the bit."""
        finite_extremes(self.weight, self.what)
        matrix = as_matrix(self.weight)
        qparams = self.qparams()
        expand = self.scheme.granularity.expand
        zero_point = qparams.zero_point
        spread = QParams(
            expand(qparams.scale, matrix.shape[1]),
            None if zero_point is None else expand(zero_point, matrix.shape[1]),
        )
        codes = quantize(matrix, spread, self.fmt)
        return QuantizedWeight.from_codes(codes.view(self.weight.shape), qparams, self.scheme)

    def extra_repr(self) -> str:
        """Scheme and shape, for ``repr``."""
        return f"{self.scheme.name}, shape={tuple(self.weight.shape)}"


class LearnedActivation(_LearnedGridModule):
    """An activation's learned range, one for the whole tensor; stands where :class:`StaticQuantizer` will.

    Without calibration it takes the range of what it sees while it is not quantizing (a quantization delay),
    or else of its first batch. Buffers: ``low`` and ``high``, float32 ``[]``, the extremes seen so far.
    """

    low: Tensor
    high: Tensor

    def __init__(self, fmt: Format, row_dims: int = 1) -> None:
        super().__init__(fmt, ())
        self.row_dims = row_dims
        self.calibrated = False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def set(self, qparams: QParams) -> None:
        """Start from these scalar qparams."""
        super().set(qparams)
        self.calibrated = True

    def start_from_seen(self) -> None:
        """Cover the extremes seen so far; without any, the first batch decides."""
        if self.high > self.low:
            self.set(qparams_from_range(self.low, self.high, self.fmt))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the learned grid, any shape; observed and passed on while not quantizing."""
        if not self.quantizing:
            self._observe(x)
            return x
        if not self.calibrated:
            self._observe(x)
            self.start_from_seen()
        values = x.shape[-self.row_dims :].numel() if x.dim() >= self.row_dims else x.numel()
        zero_point = None if self.zero_share is None else self.zero_share * self.fmt.max
        scale, gradient_scale = self.log_scale.exp(), self._gradient_scale(values)
        return learned_fake_quantize(x.to(torch.float32), scale, zero_point, self.fmt, gradient_scale).to(
            x.dtype
        )

    def stored(self) -> StaticQuantizer:
        """The quantizer with the learned qparams."""
        quantizer = StaticQuantizer(self.fmt).to(self.low.device)
        quantizer.set(self.qparams())
        return quantizer

    def get_extra_state(self) -> Any:
        """As for weights, and whether the range is chosen."""
        return self.quantizing, self.calibrated

    def set_extra_state(self, state: Any) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.quantizing, self.calibrated = map(bool, state)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        if x.numel():
            low, high = torch.aminmax(x.detach())
            torch.minimum(self.low, low, out=self.low)
            torch.maximum(self.high, high, out=self.high)

    def extra_repr(self) -> str:
        """Format, for ``repr``."""
        return f"{self.fmt.name}, learned"


class _StraightThrough(torch.autograd.Function):
    """The second argument forward, the gradient to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class RowWiseActivation(nn.Module):
    """A dynamic quantizer in training: its range comes from each row, so there is nothing to learn or clip."""

    def __init__(self, quantizer: DynamicQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.quantizing = True

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid of its rows, with a straight-through gradient."""
        if not self.quantizing:
            return x
        result: Tensor = _StraightThrough.apply(x, self.quantizer(x.detach()))  # type: ignore[no-untyped-call]
        return result

    def freeze(self) -> None:
        """There is nothing to freeze."""

    def stored(self) -> DynamicQuantizer:
        """The quantizer itself."""
        return self.quantizer
