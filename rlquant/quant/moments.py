"""What methods gather from the inputs of a weight matrix: moments, extremes and a sample of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlquant.quant.affine import finite_extremes
from rlquant.quant.compensate import DOUBLE_COLUMNS
from rlquant.quant.kinds import MatrixNames, input_rows, matrices, matrix_inputs
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.observers import Reservoir

__all__ = ["SAMPLE_ROWS", "InputMoments", "LayerMoments"]

SAMPLE_ROWS = 512
SYMMETRIC_STEP = 512
_HAS_OUT_DTYPE = hasattr(torch.ops.aten.bmm, "dtype")  # bfloat16 multiplies, float32 adds up


class InputMoments:
    """Statistics of the input rows of one weight matrix, in blocks as :func:`input_rows` gives them.

    Rows ``x'`` are what the matrix multiplies. Beside them may come the rows ``x`` that it multiplies in the
    float network, where layers before it are quantized already; without them, ``x = x'``.

    - ``count``: rows seen
    - ``mean`` of x', ``reference_mean`` of x, ``abs_mean``, ``square_mean``, ``abs_max``: ``[blocks,
      columns]``
    - ``gram``: ``E x' x'^T`` and ``drift``: ``E (x - x') x'^T``, ``[blocks, columns, columns]``, float64 up to
      ``DOUBLE_COLUMNS`` columns and float32 beyond; covariances where ``centered``. Only where asked for; ``drift``
      is None where x' never differed from x. Once either is read, no more rows can be added
    - ``rows``: float32 ``[blocks, m, columns]``, a sample of x'; only where asked for
    """

    def __init__(self, *, gram: bool = False, centered: bool = False, sample: int = 0) -> None:
        self.count = 0
        self.centered = centered
        self._gram: _Products | None = _Products(symmetric=True) if gram else None
        self._drift: _Products | None = _Products(symmetric=False) if gram else None
        self._sample = Reservoir(sample) if sample else None
        self._sums: dict[str, Tensor] = {}
        self.abs_max = torch.zeros(())

    def add(self, rows: Tensor, reference: Tensor | None = None) -> None:
        """Take in rows x' ``[blocks, n, columns]`` and, where they differ, x of the same shape."""
        if rows.shape[1] == 0:
            return
        rows = rows.to(torch.float32)
        drift = None if reference is None else reference.to(torch.float32) - rows
        if self.count == 0:
            self._shift = rows.mean(dim=1, keepdim=True, dtype=torch.float64).to(torch.float32)
            self.abs_max = rows.new_zeros(rows.shape[0], rows.shape[2])
        self.count += rows.shape[1]
        magnitude = rows.abs()
        self.abs_max = torch.maximum(self.abs_max, magnitude.amax(dim=1))
        for name, values in (("mean", rows), ("abs", magnitude), ("square", rows.square()), ("drift", drift)):
            if values is not None:
                self._sums[name] = self._sums.get(name, 0.0) + values.sum(dim=1, dtype=torch.float64)
        # Around a value close to the mean, covariances do not drown in the mean's square.
        shifted = rows - self._shift
        if self._gram is not None:
            self._gram.add(shifted, shifted)
        if self._drift is not None and drift is not None:
            self._drift.add(drift, shifted)
        if self._sample is not None:
            self._sample.add(rows.transpose(0, 1))

    @property
    def blocks(self) -> int:
        """How many blocks there are; 0 before the first row."""
        return len(self.abs_max) if self.count else 0

    def block(self, index: int) -> InputMoments:
        """The moments of one block alone, as views."""
        part = slice(index, index + 1)
        one = InputMoments(centered=self.centered)
        one.count, one._shift, one.abs_max = self.count, self._shift[part], self.abs_max[part]
        one._sums = {name: values[part] for name, values in self._sums.items()}
        one._gram = None if self._gram is None else self._gram.block(part)
        one._drift = None if self._drift is None else self._drift.block(part)
        if self._sample is not None:
            one._sample = Reservoir(self._sample.size)
            one._sample.items = self._sample.items[:, part]
        return one

    @property
    def mean(self) -> Tensor:
        """Mean of each column of x', float64 ``[blocks, columns]``."""
        return self._sums["mean"] / self.count

    @property
    def reference_mean(self) -> Tensor:
        """Mean of each column of x, float64 ``[blocks, columns]``."""
        return self.mean + self._mean_drift()

    @property
    def abs_mean(self) -> Tensor:
        """Mean magnitude of each column, float64 ``[blocks, columns]``."""
        return self._sums["abs"] / self.count

    @property
    def square_mean(self) -> Tensor:
        """Mean square of each column, float64 ``[blocks, columns]``."""
        return self._sums["square"] / self.count

    @property
    def gram(self) -> Tensor:
        """``E x' x'^T`` or its covariance, ``[blocks, columns, columns]``."""
        assert self._gram is not None, "the moments were gathered without their Gram matrix"
        shift = self._shift[:, 0].to(torch.float64)
        offsets = [self._offset(self.mean - shift)]
        if not self.centered:
            offsets.append((shift, self.mean))
        return self._gram.finish(self.count, offsets)

    @property
    def drift(self) -> Tensor | None:
        """``E (x - x') x'^T`` or its covariance, of the shape of :attr:`gram`; None where x' is x."""
        assert self._drift is not None, "the moments were gathered without their Gram matrix"
        if self._drift.total is None:
            return None
        return self._drift.finish(self.count, [self._offset(self._mean_drift())])

    def forget_drift(self) -> None:
        """Give up the memory of :attr:`drift`, which is None from then on."""
        self._drift = _Products(symmetric=False)

    @property
    def rows(self) -> Tensor:
        """Sampled rows, float32 ``[blocks, m, columns]``."""
        assert self._sample is not None, "the moments were gathered without a sample"
        return self._sample.items.transpose(0, 1)

    def _mean_drift(self) -> Tensor:
        return self._sums["drift"] / self.count if "drift" in self._sums else torch.zeros_like(self.mean)

    def _offset(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of what to add to ``E a (x' - shift)^T``, where a has the mean ``left``."""
        shift = self._shift[:, 0].to(torch.float64)
        return left, shift - self.mean if self.centered else shift


class _Products:
    """A running sum of ``a b^T``: chunks multiply in float32 and add up in float64 (see ``DOUBLE_COLUMNS``).

    Where it is ``symmetric``, b is a, and only the blocks on and above the diagonal are computed.
    """

    def __init__(self, symmetric: bool, total: Tensor | None = None, finished: bool = False) -> None:
        self.symmetric, self.total, self.finished = symmetric, total, finished

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in rows ``[blocks, n, columns]`` each."""
        assert not self.finished, "the matrix was read already"
        columns = a.shape[2]
        if self.total is None:
            dtype = torch.float64 if columns <= DOUBLE_COLUMNS else torch.float32
            self.total = a.new_zeros((a.shape[0], columns, columns), dtype=dtype)
        left = _terms(a)
        right = left if b is a else _terms(b)
        for start in range(0, columns, SYMMETRIC_STEP):
            rows, rest = slice(start, start + SYMMETRIC_STEP), slice(start if self.symmetric else 0, columns)
            self.total[:, rows, rest] += _product(
                [term[:, :, rows] for term in left], [term[:, :, rest] for term in right]
            )

    def finish(self, count: int, offsets: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over ``count`` rows, divided by it, plus outer products ``[blocks, columns]``; in place, once."""
        assert self.total is not None
        if self.finished:
            return self.total
        self.total /= count
        columns = self.total.shape[1]
        for stop in range(SYMMETRIC_STEP, columns, SYMMETRIC_STEP) if self.symmetric else ():
            rows = slice(stop - SYMMETRIC_STEP, stop)
            self.total[:, stop:, rows] = self.total[:, rows, stop:].transpose(1, 2)
        for left, right in offsets:
            dtype = self.total.dtype
            self.total.baddbmm_(left[:, :, None].to(dtype), right[:, None, :].to(dtype))
        self.finished = True
        return self.total

    def block(self, part: slice) -> _Products:
        """Some blocks, as a copy: finishing it leaves the others as they are."""
        total = None if self.total is None else self.total[part].clone()
        return _Products(self.symmetric, total, self.finished)


def _terms(x: Tensor) -> list[Tensor]:
    """Terms whose sum is x: on tensor cores two in bfloat16, which leave out what is below 2**-17 of x."""
    if not x.is_cuda or not _HAS_OUT_DTYPE:
        return [x]
    high = x.to(torch.bfloat16)
    return [high, (x - high).to(torch.bfloat16)]


def _product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """``a^T b`` in float32, ``[blocks, i, j]``, of terms ``[blocks, n, i]`` and ``[blocks, n, j]``."""
    if len(a) == 1:
        return a[0].transpose(1, 2) @ b[0]
    (high_a, low_a), (high_b, low_b) = a, b

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.transpose(1, 2), right, out_dtype=torch.float32)

    return multiply(high_a, high_b) + multiply(high_a, low_b) + multiply(low_a, high_b)


class LayerMoments:
    """The moments of every weight matrix of a layer, by the name of its packed weight.

    Where ``quantized`` is given, the rows are what the quantized layer multiplies: on its activation grid.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        *,
        gram: bool = False,
        centered: bool = False,
        sample: int = 0,
        quantized: QuantizedLayer | None = None,
    ) -> None:
        self.name, self.layer, self.quantized = name, layer, quantized
        self.names = matrices(layer)
        self.by_matrix = {
            names.packed: InputMoments(gram=gram, centered=centered, sample=sample) for names in self.names
        }
        self._references: list[list[Tensor]] = []

    def observe_reference(self, x: Tensor, hx: Any = None) -> None:
        """Take in the arguments of a call in the float network; the quantized one's follow."""
        self._references.append(matrix_inputs(self.layer, x, hx))

    def observe(self, x: Tensor, hx: Any = None) -> None:
        """Take in the arguments of a call. Raises InputError for NaN or Inf."""
        inputs = matrix_inputs(self.layer, x, hx)
        references: list[Tensor | None] = [None] * len(inputs)
        if self._references:
            references = list(self._references.pop(0))
        for names, part, reference in zip(self.names, inputs, references, strict=True):
            if part.numel():
                finite_extremes(part, f"the calibration input of layer {self.name!r}")
                self._add(names, part, reference)

    def _add(self, names: MatrixNames, part: Tensor, reference: Tensor | None) -> None:
        entering = part
        if self.quantized is not None:
            entering = self.quantized.get_submodule(names.quantizer)(part)
        moments = self.by_matrix[names.packed]
        # A router may send other rows here once layers before it are quantized: those have no counterpart.
        if reference is None or reference.shape != part.shape:
            reference = part
        if entering is reference or torch.equal(entering, reference):
            for rows in input_rows(self.layer, entering):
                moments.add(rows)
            return
        for rows, float_rows in zip(
            input_rows(self.layer, entering), input_rows(self.layer, reference), strict=True
        ):
            moments.add(rows, float_rows)
