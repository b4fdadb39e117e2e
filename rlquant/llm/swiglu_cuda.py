"""SwiGLU (Shazeer 2020, arXiv:2002.05202) as one Triton kernel forward and one backward, which needs no memory.

The intermediate activations are the largest of a block. Autograd keeps four of that size and makes three more on the
way back; here two are kept, and their gradients take their place.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["swiglu"]

_WIDTH = 1024


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, computed in float32 and rounded once to the dtype of ``gate``.

    Args:
        gate, up: of the same shape and dtype, contiguous. **Their memory holds their gradients after a backward pass**,
            so nothing else may keep them.
    """
    product: Tensor = _SwiGLU.apply(gate, up)
    return product


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        _forward[(triton.cdiv(gate.numel(), _WIDTH),)](gate, up, out, gate.numel(), _WIDTH)
        ctx.save_for_backward(gate, up)
        ctx.spent = False
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        if ctx.spent:
            raise RuntimeError(
                "swiglu's inputs hold its gradients: it goes backward once, without retain_graph"
            )
        ctx.spent = True
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        _backward[(triton.cdiv(gate.numel(), _WIDTH),)](gate, up, grad, gate.numel(), _WIDTH)
        return gate, up


@triton.jit
def _forward(gate, up, out, count, width: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gate, up, grad, count, width: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, width)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(gate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(gate.dtype.element_ty), mask=inside)
    tl.store(up + at, (d * g * s).to(up.dtype.element_ty), mask=inside)
