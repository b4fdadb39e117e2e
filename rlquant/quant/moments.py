"""What methods gather from the inputs of a weight matrix: moments, extremes and a sample of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlquant.quant.affine import finite_extremes
from rlquant.quant.kinds import input_rows, matrices, matrix_inputs
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.observers import Reservoir

__all__ = ["SAMPLE_ROWS", "InputMoments", "LayerMoments"]

SAMPLE_ROWS = 512


class InputMoments:
    """Statistics of the input rows of one weight matrix, in blocks as :func:`input_rows` gives them.

    - ``count``: rows seen; ``mean``, ``abs_mean``, ``square_mean``, ``abs_max``: ``[blocks, columns]``
    - ``gram``: float64 ``[blocks, columns, columns]``, the mean of ``x x^T``; only where asked for
    - ``rows``: float32 ``[blocks, m, columns]``, a sample of at most ``SAMPLE_ROWS``; only where asked for
    """

    def __init__(self, *, gram: bool = False, sample: int = 0) -> None:
        self.count = 0
        self._wants_gram = gram
        self._sample = Reservoir(sample) if sample else None
        self._sum = self._abs_sum = self._square_sum = self.abs_max = torch.zeros(())
        self._gram: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take in rows ``[blocks, n, columns]``."""
        rows = rows.to(torch.float32)
        if rows.shape[1] == 0:
            return
        if self.count == 0:
            zeros = rows.new_zeros(rows.shape[0], rows.shape[2], dtype=torch.float64)
            self._sum = self._abs_sum = self._square_sum = zeros
            self.abs_max = rows.new_zeros(rows.shape[0], rows.shape[2])
        self.count += rows.shape[1]
        magnitude = rows.abs()
        self._sum = self._sum + rows.sum(dim=1, dtype=torch.float64)
        self._abs_sum = self._abs_sum + magnitude.sum(dim=1, dtype=torch.float64)
        self._square_sum = self._square_sum + rows.square().sum(dim=1, dtype=torch.float64)
        self.abs_max = torch.maximum(self.abs_max, magnitude.amax(dim=1))
        if self._wants_gram:
            # Chunks multiply in float32 and add up in float64: damping is 1e4 times the rounding.
            products = (rows.transpose(1, 2) @ rows).to(torch.float64)
            self._gram = products if self._gram is None else self._gram.add_(products)
        if self._sample is not None:
            self._sample.add(rows.transpose(0, 1))

    @property
    def blocks(self) -> int:
        """How many blocks there are; 0 before the first row."""
        return len(self._sum) if self.count else 0

    def block(self, index: int) -> InputMoments:
        """The moments of one block alone, as views."""
        one = InputMoments(gram=self._wants_gram)
        one.count = self.count
        if self.count:
            part = slice(index, index + 1)
            one._sum, one._abs_sum = self._sum[part], self._abs_sum[part]
            one._square_sum, one.abs_max = self._square_sum[part], self.abs_max[part]
            one._gram = None if self._gram is None else self._gram[part]
            if self._sample is not None:
                one._sample = Reservoir(self._sample.size)
                one._sample.items = self._sample.items[:, part]
        return one

    @property
    def mean(self) -> Tensor:
        """Mean of each column, float64 ``[blocks, columns]``."""
        return self._sum / max(1, self.count)

    @property
    def abs_mean(self) -> Tensor:
        """Mean magnitude of each column, float64 ``[blocks, columns]``."""
        return self._abs_sum / max(1, self.count)

    @property
    def square_mean(self) -> Tensor:
        """Mean square of each column, float64 ``[blocks, columns]``."""
        return self._square_sum / max(1, self.count)

    @property
    def gram(self) -> Tensor:
        """Mean of ``x x^T``, float64 ``[blocks, columns, columns]``."""
        assert self._gram is not None, "the moments were gathered without their Gram matrix"
        return self._gram / max(1, self.count)

    @property
    def rows(self) -> Tensor:
        """Sampled rows, float32 ``[blocks, m, columns]``."""
        assert self._sample is not None, "the moments were gathered without a sample"
        return self._sample.items.transpose(0, 1)


class LayerMoments:
    """The moments of every weight matrix of a layer, by the name of its packed weight.

    Where ``quantized`` is given, the rows are what the quantized layer multiplies: scaled and on its
    activation grid.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        *,
        gram: bool = False,
        sample: int = 0,
        quantized: QuantizedLayer | None = None,
    ) -> None:
        self.name, self.layer, self.quantized = name, layer, quantized
        self.names = matrices(layer)
        self.by_matrix = {names.packed: InputMoments(gram=gram, sample=sample) for names in self.names}

    def observe(self, x: Tensor, hx: Any = None) -> None:
        """Take in the arguments of one forward call. Raises InputError for NaN or Inf."""
        for names, part in zip(self.names, matrix_inputs(self.layer, x, hx), strict=True):
            if part.numel() == 0:
                continue
            finite_extremes(part, f"the calibration input of layer {self.name!r}")
            if self.quantized is not None:
                part = self.quantized.get_submodule(names.quantizer)(part)
            for rows in input_rows(self.layer, part):
                self.by_matrix[names.packed].add(rows)
