"""The policy as dense weights for as long as it samples: base and adapter added up, rebuilt after each update.

A step then reads more memory and does far less: one product a layer, where packed weights are unpacked first and the
adapter is two products more. What it samples is off by the rounding of the sum, which the logged mismatch shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.adapter_layer import AdapterLinear, DenseWeight, adapter_layers, float_weight
from rlquant.llm.adapters import base_model
from rlquant.quant import QuantizedWeight, Scheme

__all__ = ["Dense", "DensePolicy"]

Dense = Literal["float", "int8"]
_INT8 = Scheme.parse("int8")


class DensePolicy:
    """Sums of base and acting adapter, which take their layers' places while :meth:`acting`.

    They are kept in between, in tensors that stay where they are: a copy of the layers that have adapters.

    Args:
        model: with adapters.
        kind: in the dtype of the hidden states, or as int8 with a scale for each output, half of that.
    """

    def __init__(self, model: Any, kind: Dense = "float") -> None:
        self._dtype = next(base_model(model).model.norm.parameters()).dtype
        self._layers = [layer for _, layer in adapter_layers(model)]
        self._kind, self._sums = kind, list[DenseWeight]()

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Sums of the adapters as they are now; the base is only read.

        Raises:
            InputError: an adapter is DoRA's, whose sum has other norms.
        """
        for number, layer in enumerate(self._layers):
            found = self._rounded(_summed(layer))
            if number == len(self._sums):
                self._sums.append(found)
            else:
                self._sums[number].copy_(found)
        try:
            for layer, dense in zip(self._layers, self._sums, strict=True):
                layer.dense = dense
            yield
        finally:
            for layer in self._layers:
                layer.dense = None

    def _rounded(self, weight: Tensor) -> DenseWeight:
        if self._kind == "float":
            return DenseWeight(weight.to(self._dtype))
        packed = QuantizedWeight.from_float(weight, _INT8, "the sum of base and adapter")
        packed.caches = False
        return DenseWeight(packed)


@torch.no_grad()
def _summed(layer: AdapterLinear) -> Tensor:
    """float32 ``[out, in]``."""
    weight = float_weight(layer.get_base_layer()).clone()
    for name in layer.acting:
        if name in layer.lora_variant:
            raise InputError("a DoRA adapter cannot be sampled from as dense weights: set rollouts=rlquant")
        weight.addmm_(layer.lora_B[name].weight, layer.lora_A[name].weight, alpha=layer.scaling[name])
    return weight
