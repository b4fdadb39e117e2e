"""A quantized embedding table, and the output layer that may be tied to it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import QuantizedWeight

__all__ = ["QuantEmbedding"]


class QuantEmbedding(QuantizedLayer):
    """``nn.Embedding`` with a quantized table; only the rows that are asked for are dequantized.

    Input int64 ``[...]`` -> output ``[..., embedding_dim]`` in ``dtype``. Buffers: ``packed.*``.
    """

    packed: QuantizedWeight

    def __init__(self, layer: nn.Embedding, scheme: Scheme) -> None:
        """An empty one of ``layer``'s sizes and dtype. Raises InputError for schemes with activations."""
        super().__init__()
        if scheme.activations is not None:
            raise InputError(
                f"{scheme.name} cannot be the scheme of an embedding, which has no activations: take int8"
            )
        self.scheme = scheme
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        self.dtype = layer.weight.dtype
        self.packed = QuantizedWeight(tuple(layer.weight.shape), scheme)

    def load_float(self, layer: nn.Embedding, packed: Mapping[str, QuantizedWeight] | None = None) -> None:
        """Take the table, rounded to nearest, or ``packed["packed"]``."""
        self.packed = packed["packed"] if packed else QuantizedWeight.from_float(layer.weight, self.scheme)

    @property
    def weight(self) -> Tensor:
        """The dequantized table, in the dtype of the layer that was replaced."""
        return self.packed.cached(self.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of ``ids``."""
        rows = self.packed.rows(ids.reshape(-1)).to(self.dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
