"""Fake quantization of activations inside a layer: the input passes through its grid and stays a float."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.quant.affine import QParams, fake_quantize, qparams_from_range
from rlquant.quant.formats import Format
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import Float32Scale

__all__ = ["ActivationQuantizer", "DynamicQuantizer", "StaticQuantizer", "activation_quantizer"]


class StaticQuantizer(Float32Scale):
    """One calibrated range for the whole activation, the same at every call.

    Buffers: ``scale`` float32 ``[]`` and ``zero_point`` int32 ``[]``. The rows of a batch do not touch each
    other.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.fmt = fmt
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def set(self, qparams: QParams) -> None:
        """Take the qparams that calibration chose, scalars both."""
        if qparams.zero_point is None:
            raise InputError("activations are quantized asymmetrically: their qparams need a zero point")
        self.scale.copy_(qparams.scale)
        self.zero_point.copy_(qparams.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` (any shape, float); the gradient is straight-through inside the range."""
        # One fused op with the arithmetic of affine.fake_quantize; tests hold the two equal bit for bit.
        grid = torch.fake_quantize_per_tensor_affine(
            x.to(torch.float32), self.scale, self.zero_point, 0, int(self.fmt.max)
        )
        return grid.to(x.dtype)

    def extra_repr(self) -> str:
        """Format, for ``repr``."""
        return f"{self.fmt.name}, static"


class DynamicQuantizer(nn.Module):
    """A range per row at every call, from the row alone, so that batching never changes a row's result.

    A row is the last ``row_dims`` dimensions: 1 for features (a token), 3 for an image ``[C, H, W]``.
    """

    def __init__(self, fmt: Format, row_dims: int = 1) -> None:
        super().__init__()
        self.fmt = fmt
        self.row_dims = row_dims

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x`` of any shape and float dtype."""
        rows = x.flatten(-self.row_dims)
        low, high = torch.aminmax(rows, dim=-1, keepdim=True)
        quantized = fake_quantize(rows, qparams_from_range(low, high, self.fmt), self.fmt)
        return quantized.view(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        """Format, for ``repr``."""
        return f"{self.fmt.name}, dynamic"


ActivationQuantizer = StaticQuantizer | DynamicQuantizer | nn.Identity


def activation_quantizer(scheme: Scheme, row_dims: int = 1) -> ActivationQuantizer:
    """What a scheme does to an activation; the identity where it leaves activations alone."""
    if scheme.activations is None:
        return nn.Identity()
    if scheme.dynamic:
        return DynamicQuantizer(scheme.activations, row_dims)
    return StaticQuantizer(scheme.activations)
