"""The kinds of layers that can be quantized, and the weight matrices in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlquant.quant.granularity import CHUNK_ELEMENTS
from rlquant.quant.layers import QuantConv2d, QuantizedLayer, QuantLinear
from rlquant.quant.recurrent import QuantGRU, QuantLSTM, run_float_layers
from rlquant.quant.scheme import Scheme

__all__ = [
    "QUANTIZED_TYPES",
    "MatrixNames",
    "empty_layer",
    "input_rows",
    "matrices",
    "matrix_inputs",
]

_CUDA_ELEMENTS = 2**26  # 256 MiB in float32

# Exact types: a subclass may compute something else, and replacing it would change the network.
QUANTIZED_TYPES: dict[type[nn.Module], Callable[[Any, Scheme], QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
}


def empty_layer(layer: nn.Module, scheme: Scheme) -> QuantizedLayer:
    """The quantized layer of the same kind and sizes as ``layer``, on its device, still without weights."""
    device = next(layer.parameters()).device
    empty = QUANTIZED_TYPES[type(layer)](layer, scheme)
    return empty.to(device)


@dataclass(frozen=True)
class MatrixNames:
    """Where the parts of one weight matrix are found: ``weight`` and ``bias`` in the float layer and (the
    bias) in the quantized one; ``packed`` and ``quantizer`` in the quantized one."""

    weight: str
    bias: str
    packed: str
    quantizer: str


def matrices(layer: nn.Module) -> list[MatrixNames]:
    """The weight matrices of a layer: one, or two for each layer of an LSTM or GRU."""
    if not isinstance(layer, nn.LSTM | nn.GRU):
        return [MatrixNames("weight", "bias", "packed", "input_quant")]
    return [
        MatrixNames(f"weight_{part}_l{k}", f"bias_{part}_l{k}", f"packed_{part}_l{k}", f"{kind}_quant_l{k}")
        for k in range(layer.num_layers)
        for part, kind in (("ih", "input"), ("hh", "hidden"))
    ]


def matrix_inputs(layer: nn.Module, x: Tensor, hx: Any = None) -> list[Tensor]:
    """What each of :func:`matrices` multiplies when ``layer`` is called on ``x``, hidden states included."""
    if isinstance(layer, nn.LSTM | nn.GRU):
        return [part for pair in run_float_layers(layer, x, hx) for part in pair]
    return [x]


def input_rows(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """``x`` as rows that the weight matrix multiplies: float ``[blocks, n, columns]``, in bounded chunks.

    A Conv2d's rows are its unfolded patches; with ``groups`` there is one block per group, whose rows meet
    ``out_channels / groups`` rows of the weight. Everything else has one block.
    """
    if not isinstance(layer, nn.Conv2d):
        rows = x.detach().reshape(1, -1, x.shape[-1])
        # A GPU multiplies few rows as slowly as many, and each product is added to a large matrix.
        most = _CUDA_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS
        yield from torch.split(rows, max(1, most // max(1, x.shape[-1])), dim=1)
        return
    images = x.detach() if x.dim() == 4 else x.detach()[None]
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    patch = layer.in_channels * kernel[0] * kernel[1]
    step = max(1, CHUNK_ELEMENTS // max(1, patch * images.shape[-1] * images.shape[-2]))
    for part in torch.split(images, step):
        padded = F.pad(part, layer._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, kernel, dilation=dilation, stride=stride)  # [N, patch, places]
        blocks = patches.view(len(part), layer.groups, patch // layer.groups, -1)
        yield blocks.permute(1, 0, 3, 2).reshape(layer.groups, -1, patch // layer.groups)
