"""Inputs and losses that the tests of methods share."""

import copy

import numpy as np
import torch
from torch import nn

from rlquant.quant import quantize_


def correlated(rows: int, columns: int, seed: int = 0, factors: int = 4) -> torch.Tensor:
    """Inputs of few common factors and unequal sizes, as hidden activations are."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, factors, generator=g) @ torch.randn(factors, columns, generator=g)
    noise = 0.3 * torch.randn(rows, columns, generator=g)
    return (mixed + noise) * torch.logspace(-0.5, 0.5, columns)[torch.randperm(columns, generator=g)]


def linear(inputs: int, outputs: int, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias)


def output_loss(layer: nn.Module, quantized: nn.Module, x: torch.Tensor) -> float:
    """Mean squared difference of the outputs."""
    with torch.no_grad():
        return float((layer(x).double() - quantized(x).double()).square().mean())


def loss_of(layer: nn.Module, scheme: str, method: str, x: torch.Tensor) -> float:
    """:func:`output_loss` of a copy quantized on ``x``."""
    return output_loss(layer, quantize_(copy.deepcopy(layer), scheme, method=method, calibration=x), x)


def row_losses(error: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """``e H e^T`` of each row in float64."""
    return np.einsum("ri,ij,rj->r", error, hessian, error)
