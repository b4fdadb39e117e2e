"""Bytes of a language model's weights at a precision, from its sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch

from rlquant.errors import InputError, unknown_name
from rlquant.llm.architecture import Architecture
from rlquant.llm.load import DTYPES
from rlquant.quant import QuantizedWeight, Scheme, weight_bytes
from rlquant.quant.double import BLOCK
from rlquant.quant.granularity import CHUNK_ELEMENTS

__all__ = ["Precision", "WeightBytes"]

# What bitsandbytes' kernels read packed; all else is unpacked by rlquant's own layers.
_BITSANDBYTES = ("nf4", "nf4-dq", "fp4_e2m1", "fp4_e2m1-dq", "int8")
# Temporaries of QuantizedWeight.dequantize, bytes a weight of the rows that it takes at a time: int32 codes and float32
# values; then what spreading the scales of groups adds, and what a codebook or a zero point does.
_UNPACKING, _SPREADING, _LOOKING_UP = 12, 4, 4


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the blocks' matrices, of the embedding (and an output layer of its own), and of norms and biases."""

    blocks: int
    tables: int
    vectors: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.blocks + self.tables + self.vectors


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    Attributes:
        name: such as ``bf16``, ``int4-g128``, ``nf4-dq+embedding=int8``.
        blocks: scheme of the linear layers of the blocks; None where they stay in ``dtype``.
        tables: of the embedding and the output layer, likewise.
        dtype: of what is not packed: ``bf16``, ``fp16`` or ``fp32``.
    """

    name: str
    blocks: Scheme | None
    tables: Scheme | None
    dtype: str

    @classmethod
    def parse(cls, name: str, *, embedding: str | None = None, dtype: str = "bf16") -> Precision:
        """Of a float dtype or a scheme, either followed by ``+embedding=SCHEME`` or not.

        Args:
            name: as above; a float dtype is also that of what is not packed.
            embedding: scheme of the embedding and the output layer where ``name`` says nothing about them.
            dtype: of what is not packed.

        Raises:
            InputError: there is no such scheme.
        """
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
        head, plus, rest = name.partition("+")
        key, equals, own = rest.partition("=")
        if plus and (key != "embedding" or not equals):
            raise InputError(
                f"precision {name!r} is not understood: write nf4 or, with the embedding's, nf4+embedding=int8"
            )
        table = own or embedding or dtype
        if not plus and table not in DTYPES:
            name = f"{head}+embedding={table}"
        return cls(name, _scheme(head), _scheme(table), head if head in DTYPES else dtype)

    @property
    def float_bytes(self) -> int:
        """Bytes of an element of what is not packed."""
        return DTYPES[self.dtype].itemsize

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of a product: float32 weights multiply in float32, all others in 16 bit."""
        return 4 if self.blocks is None and self.float_bytes == 4 else 2

    def weights(self, model: Architecture) -> WeightBytes:
        """Exact bytes of a model's weights, scales included."""
        shapes = [(linear.outputs, linear.inputs) for linear in model.linears]
        blocks = model.layers * sum(self._matrix(shape, self.blocks) for shape in shapes)
        table = self._matrix((model.vocabulary, model.hidden), self.tables)
        return WeightBytes(blocks, model.tables * table, model.vectors * self.float_bytes)

    def unpacked(self, model: Architecture) -> int:
        """Bytes that the largest matrix of a block takes while it is multiplied with, beside its packed form."""
        largest = max(linear.weights for linear in model.linears)
        if self.blocks is None:
            return 0
        return largest * self.compute_bytes + (
            0 if self.blocks.name in _BITSANDBYTES else _unpacking(largest, self.blocks)
        )

    def unpacked_head(self, model: Architecture) -> int:
        """The same of the output layer, which is as large as the vocabulary."""
        weights = model.vocabulary * model.hidden
        return 0 if self.tables is None else weights * self.compute_bytes + _unpacking(weights, self.tables)

    def _matrix(self, shape: tuple[int, int], scheme: Scheme | None) -> int:
        return math.prod(shape) * self.float_bytes if scheme is None else _bytes(shape, scheme)


def _scheme(name: str) -> Scheme | None:
    return None if name in DTYPES else Scheme.parse(name)


def _unpacking(weights: int, scheme: Scheme) -> int:
    grouped = scheme.granularity.group_size is not None
    mapped = scheme.weights.kind == "codebook" or not scheme.symmetric
    each = _UNPACKING + _SPREADING * grouped + _LOOKING_UP * mapped
    return min(weights, CHUNK_ELEMENTS) * each


@cache
def _bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Exact bytes of a packed ``[outputs, inputs]`` matrix, scales included."""
    with torch.device("meta"):
        single = weight_bytes(QuantizedWeight(shape, replace(scheme, double=False)))
    if not scheme.double:
        return single
    scales = math.prod(scheme.granularity.scale_shape(*shape))
    return single - 4 * scales + scales + 4 * -(-scales // BLOCK) + 4  # codes, their ranges, and the offset
