"""A quantized linear layer as every checkpoint format sees it, on its way from or to files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.checkpoints.permuted import PermutedLinear
from rlquant.quant import Granularity, QParams, QuantizedWeight, QuantLinear, Scheme, get_format

__all__ = ["AffineLinear", "half", "int_scheme"]


@dataclass(frozen=True)
class AffineLinear:
    """``weight[n, order[k]] = scale[n, g] * (codes[n, k] - zero_point[n, g])``, g the group of column k.

    Attributes:
        scheme: integer weights per channel or group.
        codes: int32 ``[out, in]`` in ``0 .. 2**bits - 1``, those of symmetric schemes too.
        scale: float32 ``[out, groups]``.
        zero_point: int32 ``[out, groups]``; ``2**(bits - 1)`` in symmetric schemes.
        order: int64 ``[in]``, the input that each column multiplies; None where they are in order.
        activation: static qparams of the input; None for other schemes.
        bias: ``[out]`` or None.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    order: Tensor | None = None
    activation: QParams | None = None
    bias: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.scheme.weights.bits

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None for all."""
        return self.scheme.granularity.group_size

    @classmethod
    def of(cls, layer: QuantLinear, name: str) -> AffineLinear:
        """What a layer holds.

        Raises:
            InputError: its weights are no integers, or it does more than a checkpoint can say. It is named.
        """
        _check(layer, name)
        packed, qparams = layer.packed, layer.packed.qparams()
        assert qparams is not None
        middle = 2 ** (layer.scheme.weights.bits - 1)
        codes, scale, zero_point = packed.unpacked(), qparams.scale, qparams.zero_point
        if zero_point is None:
            codes = codes ^ middle  # two's complement to offset
            zero_point = torch.full(scale.shape, middle, dtype=torch.int32, device=scale.device)
        quantizer = layer.activation_quantizers().get("input_quant")
        return cls(
            layer.scheme,
            codes,
            scale.expand(len(codes), -1),
            zero_point.expand(len(codes), -1),
            layer.input_order.long() if isinstance(layer, PermutedLinear) else None,
            None if quantizer is None else QParams(quantizer.scale, quantizer.zero_point),
            layer.bias,
        )

    def layer(self, linear: nn.Linear) -> QuantLinear:
        """The layer that computes with this, in place of a float one of the same sizes (on any device)."""
        empty = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        layer = QuantLinear(empty, self.scheme) if self.order is None else PermutedLinear(empty, self)
        codes, point = self.codes, self.zero_point
        if self.scheme.symmetric:
            codes = codes ^ 2 ** (self.bits - 1)
        qparams = QParams(self.scale, None if self.scheme.symmetric else point)
        layer.packed = QuantizedWeight.from_codes(codes, qparams, self.scheme)
        layer.packed.caches = False
        layer.bias = self.bias
        if self.activation is not None:
            layer.set_activations({"input_quant": self.activation})
        return layer


def int_scheme(bits: int, group_size: int | None, *, symmetric: bool) -> Scheme:
    """Integer weights in groups of so many columns; None: a scale for a whole row."""
    granularity = Granularity("channel") if group_size is None else Granularity("group", group_size)
    return Scheme(get_format(f"int{bits}"), granularity=granularity, symmetric=symmetric)


def half(scale: Tensor, name: str) -> Tensor:
    """Scales in float16, each off by at most one part in 2,048 (more below 6e-5).

    Raises:
        InputError: one would vanish or overflow.
    """
    rounded = scale.to(torch.float16)
    if not bool((rounded.isfinite() & (rounded > 0)).all()):
        raise InputError(
            f"{name}: scales from {float(scale.min()):g} to {float(scale.max()):g} do not fit in float16, "
            "which this format stores; compressed-tensors keeps them in float32"
        )
    return rounded


def _check(layer: QuantLinear, name: str) -> None:
    if layer.scheme.weights.kind != "int":
        raise InputError(
            f"{name} holds {layer.scheme.name}; these checkpoint formats hold integers: quantize to int4-g128, "
            "int4-g128-asym or int8"
        )
    if layer.input_scale is not None:
        raise InputError(
            f"{name} scales its inputs by factors that could not be folded into the layer before; checkpoint "
            "formats have no place for them: quantize with gptq, clip, hqq or rtn instead of awq or smoothquant"
        )
    if layer.outlier_index is not None:
        raise InputError(
            f"{name} keeps outlier channels in 16 bit; checkpoint formats have no place for them: quantize "
            "without the method 'outlier'"
        )
