"""Small float32 heads that read a score off hidden states: of reward models and critics. Never quantized."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["ScoreHead"]


class ScoreHead(nn.Module):
    """``scale * (w h + b) + shift``: hidden states ``[..., size]`` of any dtype to float32 scores ``[...]``.

    Args:
        size: of a hidden state.
        seed: of the initial weights; None starts at zero everywhere.

    Weights start as N(0, 1 / (size + 1)) for a reward model and as zero for a critic (Huang et al. 2023, details
    "layer initialization"). ``scale`` and ``shift`` are buffers, not trained: see :meth:`normalise_`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, size: int, *, seed: int | None) -> None:
        super().__init__()
        weight = torch.zeros(size)
        if seed is not None:
            weight = torch.randn(size, generator=torch.Generator().manual_seed(seed)) / math.sqrt(size + 1)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """The scores."""
        with torch.autocast(hidden.device.type, enabled=False):
            raw = hidden.to(torch.float32) @ self.weight + self.bias
            return raw * self.scale + self.shift

    @torch.no_grad()
    def normalise_(self, scores: Tensor) -> None:
        """Give scores like these ``[n]`` mean 0 and standard deviation 1 from now on, as before PPO (Ziegler 2019)."""
        deviation = scores.std(correction=0).clamp_min(1e-6)
        self.shift.copy_((self.shift - scores.mean()) / deviation)
        self.scale.div_(deviation)
