"""Quantized Linear and Conv2d: packed weights at rest, fake-quantized arithmetic in float.

Each forward is the float operation on the fake-quantized input and the dequantized weight, so its result is
what an integer runtime of the same numbers computes, up to float rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlquant.quant.activations import StaticQuantizer, activation_quantizer
from rlquant.quant.affine import QParams, finite_extremes
from rlquant.quant.packed_linear import linear_of_packed
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import QuantizedWeight

__all__ = ["QuantConv2d", "QuantLinear", "QuantizedLayer", "device_of"]


_OPTIONAL = ("input_scale", "outlier_index", "outlier_weight")


class QuantizedLayer(nn.Module):
    """What every quantized layer has: its scheme, and quantizers for the activations it names."""

    scheme: Scheme

    def load_float(self, layer: Any, packed: Mapping[str, QuantizedWeight] | None = None) -> None:
        """Take the float layer's biases, and its weights rounded to nearest or those in ``packed``."""
        raise NotImplementedError

    def activation_quantizers(self) -> dict[str, StaticQuantizer]:
        """The static quantizers by name, such as ``input_quant``; none in weight-only and dynamic schemes."""
        return {name: part for name, part in self.named_children() if isinstance(part, StaticQuantizer)}

    def set_activations(self, qparams: dict[str, QParams]) -> None:
        """Give every static quantizer its calibrated qparams."""
        for name, quantizer in self.activation_quantizers().items():
            quantizer.set(qparams[name])


class _OneWeight(QuantizedLayer):
    """A layer of one weight and one input. Buffers: ``packed.*``, ``bias``, ``input_quant.*`` (static).

    Buffers that only some methods make, and that loading a state dict brings back:

    - ``input_scale``: float32 ``[channels]``, multiplies the input before anything else sees it
    - ``outlier_index``: int32 ``[k]`` and ``outlier_weight``: float16 ``[out, k, ...]``, input channels that
      stay in 16 bit; their codes in ``packed`` are zero
    """

    bias: Tensor | None
    input_scale: Tensor | None
    outlier_index: Tensor | None
    outlier_weight: Tensor | None
    packed: QuantizedWeight
    input_dims = 1

    def _build(self, layer: nn.Linear | nn.Conv2d, scheme: Scheme) -> None:
        self.scheme = scheme
        self.packed = QuantizedWeight(tuple(layer.weight.shape), scheme)
        self.register_buffer("bias", None if layer.bias is None else torch.zeros_like(layer.bias.detach()))
        for name in _OPTIONAL:
            self.register_buffer(name, None)
        self.input_quant = activation_quantizer(scheme, self.input_dims)

    def load_float(
        self, layer: nn.Linear | nn.Conv2d, packed: Mapping[str, QuantizedWeight] | None = None
    ) -> None:
        """Take the layer's weight, rounded to nearest, or ``packed["packed"]``; and its bias."""
        self.packed = packed["packed"] if packed else QuantizedWeight.from_float(layer.weight, self.scheme)
        if layer.bias is not None:
            finite_extremes(layer.bias, "the bias")
            self.bias = layer.bias.detach().clone()

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32."""
        return self.packed.cached()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's map of ``x``."""
        if self.input_scale is not None:
            x = x * self._per_channel(self.input_scale).to(x.dtype)
        if self.outlier_index is None:
            return self._map(self.input_quant(x), self.packed.cached(x.dtype), self.bias)
        assert self.outlier_weight is not None
        rest = x.index_fill(-self.input_dims, self.outlier_index.long(), 0.0)
        outliers = x.index_select(-self.input_dims, self.outlier_index)
        y = self._map(self.input_quant(rest), self.packed.cached(x.dtype), self.bias)
        return y + self._map(outliers, self.outlier_weight.to(x.dtype), None)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation."""
        raise NotImplementedError

    def _per_channel(self, values: Tensor) -> Tensor:
        """``[channels]`` in the shape that broadcasts against the input."""
        return values.view(-1, *(1,) * (self.input_dims - 1))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name in ("bias", *_OPTIONAL):
            saved = state_dict.get(prefix + name)
            current = getattr(self, name)
            if saved is not None and (
                current is None or (name in _OPTIONAL and current.shape != saved.shape)
            ):
                setattr(self, name, torch.zeros_like(saved, device=device_of(self.packed)))
            elif saved is None and name in _OPTIONAL:
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantLinear(_OneWeight):
    """``nn.Linear`` with a quantized weight and, by scheme, a quantized input.

    Input ``[..., in_features]`` -> output ``[..., out_features]``, in the input's dtype.
    """

    def __init__(self, layer: nn.Linear, scheme: Scheme) -> None:
        """An empty layer of ``layer``'s sizes: fill it with :meth:`load_float` or ``load_state_dict``."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._build(layer, scheme)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's map of ``x``."""
        if self.packed.caches or self.outlier_index is not None:
            return super().forward(x)
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        return linear_of_packed(self.input_quant(x), self.packed, self.bias)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantConv2d(_OneWeight):
    """``nn.Conv2d`` with a quantized weight and, by scheme, a quantized input (dynamic: a range per image).

    Input ``[N, C, H, W]`` or ``[C, H, W]``, with the stride, padding, dilation, groups and padding mode of
    the layer it replaces. Zero padding is exact: zero lies on every activation grid.
    """

    input_dims = 3

    def __init__(self, layer: nn.Conv2d, scheme: Scheme) -> None:
        """An empty layer of ``layer``'s sizes: fill it with :meth:`load_float` or ``load_state_dict``."""
        super().__init__()
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride, self.padding = layer.kernel_size, layer.stride, layer.padding
        self.dilation, self.groups, self.padding_mode = layer.dilation, layer.groups, layer.padding_mode
        self._border = list(layer._reversed_padding_repeated_twice)
        self._build(layer, scheme)

    def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        x = F.pad(x, self._border, mode=self.padding_mode)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )


def device_of(module: nn.Module) -> torch.device:
    """Where a module that holds anything is: the device of its first parameter, or else of its first buffer."""
    return next(chain(module.parameters(), module.buffers())).device
