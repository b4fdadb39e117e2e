"""The LoRA layer of every base layer: float, packed by us, or bitsandbytes'.

PEFT's own computes in the adapter's dtype, which for float32 adapters on a bfloat16 base is a float32 product for
each layer; here the weights stay float32 and the products are in the dtype of the input, as under autocast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from rlquant.errors import InputError
from rlquant.llm.fused_nf4 import can_fuse, nf4_linear, nf4_lora
from rlquant.quant import QuantizedWeight, QuantLinear, device_of

__all__ = [
    "BASE_LAYERS",
    "AdapterLinear",
    "DenseWeight",
    "adapter_layers",
    "float_weight",
    "named_as_peft_does",
]

BASE_LAYERS: tuple[type[nn.Module], ...] = (QuantLinear, nn.Linear)
"""What takes adapters; bitsandbytes' ``Linear4bit`` and ``Linear8bitLt`` are ``nn.Linear`` too."""


@dataclass(frozen=True)
class DenseWeight:
    """Weights that take a layer's place for a while; no part of it, as a module would be.

    Attributes:
        held: float ``[out, in]``, or quantized.
    """

    held: Tensor | QuantizedWeight

    def real(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]``; quantized weights in ``dtype``."""
        return self.held if isinstance(self.held, Tensor) else self.held.dequantize(dtype)

    def copy_(self, other: DenseWeight) -> None:
        """Become another of the same kind, in place."""
        held: Any = other.held
        if isinstance(self.held, Tensor):
            self.held.copy_(held)
        else:
            self.held.load_state_dict(held.state_dict())


class AdapterLinear(LoraLinear):
    """``y = base(x) + scaling * B(A(dropout(x)))`` for the active adapters; ``[..., in]`` -> ``[..., out]``.

    DoRA goes the way of PEFT, in the adapter's dtype. A packed base is never written to; a float one takes a merge.

    Attributes:
        dense: takes the place of base and adapters where it is set, see ``dense_policy.py``.
    """

    dense: DenseWeight | None = None

    @property
    def acting(self) -> list[str]:
        """Names of the adapters that the layer adds."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's map of ``x``, in the dtype of the base layer's output."""
        if self.dense is not None:
            dense = self.dense.real(x.dtype)
            return F.linear(x.to(dense.dtype), dense, self.base_layer.bias).to(x.dtype)
        active = self.acting
        if kwargs or any(name in self.lora_variant for name in active):
            mapped: Tensor = super().forward(x, *args, **kwargs)
            return mapped
        if self._fuses(x, active):
            return self._fused(x, active)
        result: Tensor = self.base_layer(x)
        for name in active:
            down = F.linear(self.lora_dropout[name](x), self.lora_A[name].weight.to(x.dtype))
            up = F.linear(down, self.lora_B[name].weight.to(down.dtype))
            result = result + (up * self.scaling[name]).to(result.dtype)
        return result

    def _fuses(self, x: Tensor, active: list[str]) -> bool:
        """One row is bitsandbytes' own case, and a frozen layer that passes gradients on is rare."""
        if len(active) > 1 or x.numel() == x.shape[-1] or not can_fuse(self.base_layer):
            return False
        if not active:
            return not (torch.is_grad_enabled() and x.requires_grad)
        dropout = self.lora_dropout[active[0]]
        return isinstance(dropout, nn.Identity) or not dropout.training

    def _fused(self, x: Tensor, active: list[str]) -> Tensor:
        if not active:
            return nf4_linear(x, self.base_layer)
        name = active[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return nf4_lora(x, self.base_layer, a, b, self.scaling[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises InputError for a packed base: codes do not hold a small change, and merging often drifts."""
        if type(self.get_base_layer()) is not nn.Linear:
            raise InputError(
                "an adapter cannot be merged into a packed base: merge it into the float model (or the dequantized "
                "one) and quantize that"
            )
        super().merge(safe_merge, adapter_names)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        # No dtype: adapters are float32 whatever the base is. And a packed layer's weight is not asked for.
        return device_of(base_layer), None


@contextmanager
def named_as_peft_does(model: nn.Module) -> Iterator[None]:
    """Packed codes are called ``qweight`` within, as GPTQ's are: PEFT asks where a layer is by that name first.

    Its next question, ``weight``, would dequantize a packed layer several times over.
    """
    layers = [part for part in model.modules() if isinstance(part, QuantLinear)]
    for layer in layers:
        layer.qweight = layer.packed.codes  # a plain attribute, in no state dict
    try:
        yield
    finally:
        for layer in layers:
            del layer.qweight


def adapter_layers(model: nn.Module) -> Iterable[tuple[str, AdapterLinear]]:
    """Every layer with adapters, by its name in the base model."""
    for name, part in model.named_modules():
        if isinstance(part, AdapterLinear):
            yield name.removeprefix("base_model.model."), part


def float_weight(layer: Any) -> Tensor:
    """The float32 weight of a base layer, outliers and factors of its inputs included."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(layer).detach().to(torch.float32)
    if isinstance(layer, QuantLinear):
        if layer.outlier_index is not None:
            assert layer.outlier_weight is not None
            weight = weight.index_add(1, layer.outlier_index, layer.outlier_weight.to(weight.dtype))
        if layer.input_scale is not None:
            weight = weight * layer.input_scale
    return weight
