"""A linear map whose weight stays packed between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlquant.quant.tensor import QuantizedWeight

__all__ = ["linear_of_packed"]


def linear_of_packed(x: Tensor, packed: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with a packed weight, dequantized for the forward and again for the backward pass.

    Nothing dense is kept for the backward pass; gradients flow to ``x`` and ``bias``.
    """
    result: Tensor = _PackedLinear.apply(x, packed, bias)  # type: ignore[no-untyped-call]
    return result


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.packed, ctx.has_bias = packed, bias is not None
        return F.linear(x, packed.cached(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        grad = grads[0]
        into_bias = grad.flatten(0, -2).sum(dim=0) if ctx.has_bias else None
        return grad @ ctx.packed.cached(grad.dtype), None, into_bias
