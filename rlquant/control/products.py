"""Matrix products of a program, from float and quantized layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rlquant.deploy.program import Conv2d, Linear, Weight
from rlquant.errors import InputError
from rlquant.quant import QuantConv2d, QuantizedWeight, QuantLinear
from rlquant.quant.activations import DynamicQuantizer, StaticQuantizer

__all__ = ["Grid", "product_of", "recurrent_product"]

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """The unsigned grid that a layer reads: ``q = rint(x / scale) + zero`` in ``0 .. 2**bits - 1``."""

    scale: float
    zero: int
    bits: int

    @property
    def high(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    @classmethod
    def of(cls, quantizer: nn.Module) -> Grid | None:
        """Of a layer's activation quantizer; None where it leaves floats. Raises InputError for a dynamic one."""
        if isinstance(quantizer, DynamicQuantizer):
            raise _cannot("an activation range per call (-dynamic)")
        if not isinstance(quantizer, StaticQuantizer):
            return None
        return cls(float(quantizer.scale), int(quantizer.zero_point), quantizer.fmt.bits)


def product_of(
    layer: nn.Module, source: int, grid: Grid | None, image: tuple[int, ...] | None
) -> tuple[Linear, tuple[int, ...] | None]:
    """The product of a layer, its target still open, in real units; and the shape of the image that it makes.

    Args:
        layer: float or quantized.
        source: the buffer that it reads.
        grid: of that buffer; None for float.
        image: channels, height and width of that buffer, None for a vector.

    Raises:
        InputError: a layer or a feature of its scheme that no program can do.
    """
    if not isinstance(layer, nn.Linear | nn.Conv2d | QuantLinear | QuantConv2d):
        raise _cannot(f"a layer of type {type(layer).__name__}")
    if getattr(layer, "outlier_index", None) is not None:
        raise _cannot("an outlier split")
    matrix = layer.packed if isinstance(layer, QuantLinear | QuantConv2d) else layer.weight
    parts = _parts(matrix, layer.bias, source, grid)
    if isinstance(layer, nn.Linear | QuantLinear):
        return Linear(*parts), None
    assert image is not None
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise _cannot(f"a Conv2d with padding {layer.padding!r} of mode {layer.padding_mode!r}")
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    names = ("kernel", "stride", "padding", "dilation")
    shape = dict(zip(names, geometry, strict=True))
    conv = Conv2d(*parts, image=image, blocks=layer.groups, **shape)  # type: ignore[arg-type]
    return conv, (conv.weight.rows, *conv.out_size)


def recurrent_product(rnn: Any, part: str, layer: int, source: int, grid: Grid | None) -> Linear:
    """A product of an LSTM or GRU, of its input (``part`` is ``ih``) or its hidden state (``hh``).

    As :func:`product_of`.
    """
    name = f"{part}_l{layer}"
    matrix = getattr(rnn, f"packed_{name}", None)
    bias = getattr(rnn, f"bias_{name}") if rnn.bias else None
    return Linear(*_parts(getattr(rnn, f"weight_{name}") if matrix is None else matrix, bias, source, grid))


def _parts(
    matrix: QuantizedWeight | torch.Tensor, bias: torch.Tensor | None, source: int, grid: Grid | None
) -> tuple[int, int, Weight, Floats, Floats, int, int]:
    """The fields of a :class:`Linear` up to the zero point of its source."""
    weight, scale, group = _weight(matrix, integer=grid is not None)
    offset = np.zeros(weight.rows) if bias is None else bias.detach().double().numpy()
    gain, zero = (scale, 0) if grid is None else (scale * grid.scale, grid.zero)
    return source, source, weight, offset.astype(np.float32), gain.astype(np.float32), group, zero


def _cannot(what: str) -> InputError:
    return InputError(f"{what} cannot be compiled into a program; the runtime torch can run it")


def _weight(matrix: QuantizedWeight | torch.Tensor, integer: bool) -> tuple[Weight, Array, int]:
    """The matrix, its scales, float64 ``[rows, groups]``, and the columns of a group."""
    if isinstance(matrix, QuantizedWeight):
        packed = matrix
        rows = packed.shape[0]
        columns = int(np.prod(packed.shape[1:]))
        if packed.scheme.weights.kind == "int" and packed.scheme.symmetric:
            qparams = packed.qparams()
            assert qparams is not None
            scale = np.broadcast_to(qparams.scale.double().numpy(), (rows, qparams.scale.shape[1]))
            group = packed.scheme.granularity.group_size or columns
            return Weight(rows, columns, packed.scheme.weights.bits, packed.codes.numpy()), scale, group
        if integer:
            raise _cannot(f"{packed.scheme.name} (integers beside a zero point of the weights)")
        dense = packed.dequantize().flatten(1)
    else:
        dense = matrix.detach().flatten(1)
    rows, columns = dense.shape
    return Weight(rows, columns, 32, dense.numpy()), np.ones((rows, 1)), columns
