"""Exact size accounting: every byte that a module's state dict stores, scales and zero points included."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from rlquant.quant.activations import StaticQuantizer
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.tensor import QuantizedWeight

__all__ = ["LayerSize", "size_table", "weight_bytes"]


@dataclass(frozen=True)
class LayerSize:
    """Bytes of one layer. ``weights`` counts weight elements.

    ``codes`` are packed codes, float weights, and outliers in 16 bit with their indices; ``scales`` include
    those of inputs.
    """

    name: str
    kind: str
    precision: str
    weights: int
    codes: int
    scales: int
    zero_points: int
    other: int

    @property
    def total(self) -> int:
        """All bytes of the layer."""
        return self.codes + self.scales + self.zero_points + self.other

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes with its share of scales and zero points; 0 for a layer without weights."""
        return 8.0 * (self.codes + self.scales + self.zero_points) / self.weights if self.weights else 0.0


def weight_bytes(module: nn.Module) -> int:
    """Bytes of everything in ``module.state_dict()``, a shared tensor counted once.

    That is packed codes, scales, zero points, biases, activation scales and whatever is not quantized.
    """
    return sum(row.total for row in size_table(module))


def size_table(module: nn.Module) -> list[LayerSize]:
    """One row for each layer that stores anything; the totals sum to :func:`weight_bytes`."""
    rows: list[LayerSize] = []
    seen: set[int] = set()
    inside: set[int] = set()
    counted: set[int] = set()
    for name, layer in module.named_modules():
        if id(layer) in inside:
            continue
        if isinstance(layer, QuantizedLayer):
            inside.update(id(part) for part in layer.modules())
            row = _quantized_row(name, layer, counted)
        else:
            row = _float_row(name, layer, seen)
        if row.total:
            rows.append(row)
    return rows


def _quantized_row(name: str, layer: QuantizedLayer, counted: set[int]) -> LayerSize:
    weights = [
        part for part in layer.modules() if isinstance(part, QuantizedWeight) and id(part) not in counted
    ]
    counted.update(map(id, weights))  # a tied head shares those of the embedding
    activations = [part for part in layer.modules() if isinstance(part, StaticQuantizer)]
    own = dict(layer.named_buffers(recurse=False))
    return LayerSize(
        name,
        type(layer).__name__,
        layer.scheme.name,
        weights=sum(math.prod(weight.shape) for weight in weights),
        codes=sum(_bytes(weight.codes) for weight in weights)
        + sum(_bytes(part) for name, part in own.items() if name.startswith("outlier")),
        scales=sum(
            _bytes(buffer)
            for weight in weights
            for name, buffer in weight.named_buffers()
            if name.startswith("scale")
        )
        + _bytes(own.get("input_scale")),
        zero_points=sum(_bytes(weight.zero_point) for weight in weights),
        other=sum(_bytes(buffer) for name, buffer in own.items() if name.startswith("bias"))
        + sum(_bytes(buffer) for part in activations for buffer in part.buffers()),
    )


def _float_row(name: str, layer: nn.Module, seen: set[int]) -> LayerSize:
    transient = layer._non_persistent_buffers_set
    own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    own |= {key: value for key, value in layer.named_buffers(recurse=False) if key not in transient}
    new = {key: value for key, value in own.items() if id(value) not in seen}
    seen.update(id(value) for value in new.values())
    matrices = [value for key, value in new.items() if key.startswith("weight")]
    dtypes = {str(value.dtype).removeprefix("torch.") for value in new.values() if value.is_floating_point()}
    return LayerSize(
        name,
        type(layer).__name__,
        "/".join(sorted(dtypes)),
        weights=sum(value.numel() for value in matrices),
        codes=sum(_bytes(value) for value in matrices),
        scales=0,
        zero_points=0,
        other=sum(_bytes(value) for value in new.values()) - sum(_bytes(value) for value in matrices),
    )


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
