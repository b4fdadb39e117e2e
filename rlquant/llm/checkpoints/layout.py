"""What a checkpoint format is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.checkpoints.affine_linear import AffineLinear
from rlquant.llm.checkpoints.shards import LayerTensors
from rlquant.quant import Scheme

__all__ = ["Layout", "declared", "one_scheme", "whole_groups"]


class Layout(Protocol):
    """One way to store quantized linear layers beside tensors that stay as they are."""

    mark: str
    """Part of the names of tensors that only quantized layers have."""

    repeats_head: bool
    """Whether an output layer that is tied to the embedding is written all the same."""

    def config(self, schemes: Mapping[str, Scheme], floats: Sequence[str], permuted: bool) -> dict[str, Any]:
        """``quantization_config`` of config.json.

        Args:
            schemes: of the quantized layers, by name.
            floats: linear layers in the blocks that are not quantized.
            permuted: whether some layer has columns in another order than its inputs.

        Raises:
            InputError: the format cannot say this.
        """

    def to_tensors(self, stored: AffineLinear, name: str) -> dict[str, Tensor]:
        """The tensors of one layer without its bias, by the last part of their names. Raises InputError."""

    def from_tensors(
        self, config: Mapping[str, Any], tensors: LayerTensors, rows: int, columns: int
    ) -> AffineLinear:
        """One layer of ``[rows, columns]`` out of its tensors.

        Raises:
            InputError: a tensor is missing or damaged, or the config asks for what is not supported.
        """


def one_scheme(schemes: Mapping[str, Scheme], form: str) -> Scheme:
    """The scheme of all layers. Raises InputError where there are several, or where inputs are quantized too."""
    (first, scheme), *rest = schemes.items()
    for name, other in rest:
        if other != scheme:
            raise InputError(
                f"{form} checkpoints have one scheme for all layers, but {first} holds {scheme.name} and {name} "
                f"{other.name}: export to compressed-tensors, or quantize to one scheme"
            )
    if scheme.activations is not None:
        raise InputError(
            f"{form} checkpoints hold weights alone, but {scheme.name} quantizes activations too: "
            "export to compressed-tensors"
        )
    return scheme


def whole_groups(scheme: Scheme, columns: int, name: str) -> int:
    """How many groups a row has. Raises InputError where the last one would be shorter."""
    size = scheme.granularity.group_size or columns
    if columns % size:
        raise InputError(
            f"{name} has {columns} inputs, which are no whole groups of {size}: checkpoint formats need that; "
            "take another group size"
        )
    return columns // size


def declared(config: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A field of ``quantization_config``. Raises InputError where it is missing or of another type."""
    value = config.get(key, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(
            f"quantization_config of config.json says {key} = {value!r}; it should be {kind.__name__}"
        )
    return value
