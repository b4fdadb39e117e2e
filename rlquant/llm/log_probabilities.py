"""Log-probabilities of tokens over a large vocabulary, some tokens at a time, forward and backward.

Logits of 1,000 tokens over Qwen's 152k words are 622 MB in float32, and autograd keeps several such; here a chunk's are
made, used and dropped, and made again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError

__all__ = ["CHUNK", "token_log_probs"]

CHUNK = 128
"""Tokens whose logits are held at a time: 78 MB in float32 at 152k words."""


def token_log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """``log softmax(head(hidden) / temperature)[target]`` of each token, with gradients into ``hidden``.

    Args:
        hidden: last hidden states, ``[..., size]``.
        head: the output layer, ``[n, size]`` to ``[n, vocabulary]``; frozen, quantized or not.
        targets: int64 ``[...]``.
        temperature: that the tokens are sampled at.
        chunk: tokens whose logits are held at a time.

    Returns:
        Log-probabilities in nats, and the entropy of each distribution (for monitoring: no gradient), both ``[...]``;
        float32, or float64 if ``head`` gives that.

    Raises:
        InputError: the head is trainable, or the temperature or chunk is not positive.
    """
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise InputError(
            "log-probabilities in chunks give the output layer no gradient: freeze it (requires_grad_(False))"
        )
    if not temperature > 0 or chunk < 1:
        raise InputError(f"temperature and chunk are positive, not {temperature} and {chunk}")
    flat = hidden.reshape(-1, hidden.shape[-1])
    log_probs, entropy = _Chunked.apply(  # type: ignore[no-untyped-call]
        flat, head, targets.reshape(-1), temperature, chunk
    )
    return log_probs.view(targets.shape), entropy.view(targets.shape)


class _Chunked(torch.autograd.Function):
    """The gradient of ``log p(target)`` by the logits is ``onehot(target) - p``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        log_probs, entropies, normalisers = [], [], []
        for part, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            logits = _logits(head, part, temperature)
            normaliser = torch.logsumexp(logits, dim=-1)
            log_probs.append(logits.gather(1, wanted[:, None])[:, 0] - normaliser)
            shifted = logits.sub_(normaliser[:, None])  # log p
            entropies.append(-(shifted.exp() * shifted).nan_to_num_(0.0).sum(dim=-1))
            normalisers.append(normaliser)
        ctx.head, ctx.temperature, ctx.chunk = head, temperature, chunk
        ctx.save_for_backward(hidden, targets, torch.cat(normalisers))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        hidden, targets, normalisers = ctx.saved_tensors
        into = torch.empty_like(hidden)
        parts = (torch.split(tensor, ctx.chunk) for tensor in (hidden, targets, normalisers, grads[0], into))
        for part, wanted, normaliser, grad, out in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                raw = ctx.head(leaf)
            with torch.no_grad():
                slope = _wide(raw.detach()).div(ctx.temperature).sub_(normaliser[:, None]).exp_()
                slope.mul_(-grad[:, None] / ctx.temperature)
                slope.scatter_add_(1, wanted[:, None], grad[:, None] / ctx.temperature)
            out.copy_(torch.autograd.grad(raw, leaf, slope.to(raw.dtype))[0])
        return into, None, None, None, None


def _logits(head: nn.Module, hidden: Tensor, temperature: float) -> Tensor:
    return _wide(head(hidden)).div(temperature)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)
