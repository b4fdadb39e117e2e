"""A bitsandbytes NF4 layer and its LoRA adapter as one differentiable function, with few and small steps.

What PEFT, autograd and bitsandbytes do for such a layer is right, but it is some thirty launches forward and backward,
and on models below a billion weights the GPU waits for the next launch most of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlquant.devices import has_triton

__all__ = ["can_fuse", "is_nf4", "nf4_linear", "nf4_lora"]


def can_fuse(layer: Any) -> bool:
    """Whether a layer is bitsandbytes' NF4 on a GPU, in blocks of 64 and with Triton at hand."""
    return is_nf4(layer) and layer.weight.is_cuda and has_triton()


def is_nf4(layer: Any) -> bool:
    """Whether a layer is bitsandbytes' NF4 in blocks of 64, quantized already."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return state is not None and bool(state.quant_type == "nf4" and state.blocksize == 64)


def nf4_linear(x: Tensor, layer: Any) -> Tensor:
    """``x W^T + bias`` without gradients; ``[..., in]`` -> ``[..., out]``, in the dtype of ``x``."""
    state = layer.weight.quant_state
    y = torch.nn.functional.linear(x.to(state.dtype), _weight(layer), layer.bias)
    return y.to(x.dtype)


def nf4_lora(x: Tensor, layer: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``x W^T + bias + scaling (x A^T) B^T``; ``[..., in]`` -> ``[..., out]``, in the dtype of ``x``.

    Args:
        x: any float dtype; products are in the dtype of the layer's weight.
        layer: see :func:`can_fuse`; frozen.
        a, b: float32 ``[rank, in]`` and ``[out, rank]``; their gradients are float32.
        scaling: of the adapter.
    """
    y: Tensor = _Fused.apply(x, a, b, layer, scaling)  # type: ignore[no-untyped-call]
    return y


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Any, scaling: float) -> Tensor:
        dtype = layer.weight.quant_state.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y = torch.nn.functional.linear(flat, _weight(layer), layer.bias)
        down = flat @ a.to(dtype).t()
        y.addmm_(down, b.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, down, a, b)
        ctx.layer, ctx.scaling, ctx.like = layer, scaling, x.dtype
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        flat, down, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1]).to(flat.dtype)
        up = (dy @ b.to(dy.dtype)).mul_(ctx.scaling)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.addmm(dy @ _weight(ctx.layer), up, a.to(dy.dtype))
            dx = dx.view(*grads[0].shape[:-1], -1).to(ctx.like)
        if ctx.needs_input_grad[1]:
            da = (up.t() @ flat).to(a.dtype)
        if ctx.needs_input_grad[2]:
            db = (dy.t() @ down).to(b.dtype).mul_(ctx.scaling)
        return dx, da, db, None, None


def _weight(layer: Any) -> Tensor:
    from rlquant.llm.nf4_cuda import dequantize_nf4

    return dequantize_nf4(layer.weight, layer.weight.quant_state)
