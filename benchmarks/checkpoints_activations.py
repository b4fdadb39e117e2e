"""Activations of compressed-tensors checkpoints as that library rounds them, and how much rounding matters.

For 8-bit activations of scale s and zero point z, all in float32:

- here, in torch's fake quantization and in vLLM's int8 kernels (csrc/quantization/w8a8/int8/scaled_quant.cu):
  ``round(x * (1 / s)) + z``;
- in compressed-tensors 0.20 (quantization/lifecycle/forward_helpers.py): ``round(x / s + z)``. The sum has fewer bits
  after the point than ``x / s``, so more values end up halfway between two codes, and those go to the even code after
  z was added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlquant.llm.model import LanguageModel
from rlquant.quant import QuantLinear
from rlquant.quant.activations import DynamicQuantizer, StaticQuantizer

__all__ = ["NOISE", "counted", "noisy", "rounded_as_there"]

NOISE = 3e-7
"""Relative, five units in the last place of float32: what another order of summation may leave."""
LOWEST, HIGHEST = -128, 127


def there(x: Tensor, quantizer: StaticQuantizer | DynamicQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Codes by compressed-tensors, their scale and zero point, for int8 codes."""
    if isinstance(quantizer, StaticQuantizer):
        scale, point = quantizer.scale, (quantizer.zero_point + LOWEST).float()
    else:
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / (HIGHEST - LOWEST)
        point = (LOWEST - low / scale).clamp(LOWEST, HIGHEST).round()
    return (x / scale + point).clamp(LOWEST, HIGHEST).round(), scale, point


class RoundedAsThere(nn.Module):
    """In place of a layer's quantizer."""

    def __init__(self, quantizer: StaticQuantizer | DynamicQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``, float32."""
        codes, scale, point = there(x, self.quantizer)
        return (codes - point) * scale


class Noisy(nn.Module):
    """A layer's quantizer, whose inputs are off by a little."""

    def __init__(self, quantizer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.generator = quantizer, generator

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``, float32."""
        off: Tensor = self.quantizer(x * (1 + NOISE * torch.randn(x.shape, generator=self.generator)))
        return off


class Counted(nn.Module):
    """A static quantizer that counts the codes that compressed-tensors would choose otherwise."""

    def __init__(self, quantizer: StaticQuantizer, found: list[int]) -> None:
        super().__init__()
        self.quantizer, self.found = quantizer, found

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``, float32."""
        mine: Tensor = self.quantizer(x)
        codes, scale, point = there(x, self.quantizer)
        self.found[0] += int(((mine / scale).round() != codes - point).sum())
        self.found[1] += x.numel()
        return mine


def _quantized(lm: LanguageModel) -> list[QuantLinear]:
    return [
        layer
        for layer in lm.model.modules()
        if isinstance(layer, QuantLinear)
        and isinstance(layer.input_quant, StaticQuantizer | DynamicQuantizer)
    ]


def rounded_as_there(lm: LanguageModel) -> LanguageModel:
    """The model, in place."""
    for layer in _quantized(lm):
        layer.input_quant = RoundedAsThere(layer.input_quant)  # type: ignore[assignment,arg-type]
    return lm


def noisy(lm: LanguageModel, seed: int = 0) -> LanguageModel:
    """The model, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in _quantized(lm):
        layer.input_quant = Noisy(layer.input_quant, generator)  # type: ignore[assignment]
    return lm


def counted(lm: LanguageModel) -> list[int]:
    """The model, in place: codes that differ and all codes, ``[0, 0]`` until it has read something.

    Only those of static activations, whose scales do not depend on the library.
    """
    found = [0, 0]
    for layer in _quantized(lm):
        if isinstance(layer.input_quant, StaticQuantizer):
            layer.input_quant = Counted(layer.input_quant, found)  # type: ignore[assignment]
    return found
