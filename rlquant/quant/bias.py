"""Bias correction: give back the mean that quantization took from a layer's output.

Quantizing weights and inputs shifts the mean of an output, ``E[W x] - E[Q x']``, since inputs behind a ReLU
are not centred. The bias absorbs the difference at no cost. Here ``x`` are the calibration inputs of the
layer in the float network and ``x'`` those in the network whose earlier layers are quantized already, on the
layer's activation grid: the empirical, sequential form.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlquant.quant.granularity import as_matrix
from rlquant.quant.kinds import MatrixNames
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.moments import InputMoments

__all__ = ["correct_bias_"]


def correct_bias_(
    quantized: QuantizedLayer, names: MatrixNames, weight: Tensor, moments: InputMoments
) -> None:
    """Add ``E[W x] - E[Q x']`` to one bias of a quantized layer.

    Args:
        quantized: the finished layer; a Linear or Conv2d without bias gets one.
        names: of the matrix.
        weight: its float weight ``[out, ...]``.
        moments: of its inputs, in the quantized network beside the float one.
    """
    packed = quantized.get_submodule(names.packed)
    restored = packed.dequantize()  # type: ignore[operator]
    shift = _mean_output(weight, moments.reference_mean) - _mean_output(restored, moments.mean)
    bias = getattr(quantized, names.bias, None)
    corrected = shift if bias is None else bias.double() + shift
    setattr(quantized, names.bias, corrected.to(weight.dtype))


def _mean_output(weight: Tensor, mean: Tensor) -> Tensor:
    """``W E[x]``: weight ``[out, ...]``, mean ``[blocks, columns]`` -> float64 ``[out]``."""
    blocks = as_matrix(weight).to(torch.float64).view(len(mean), -1, mean.shape[1])
    return (blocks @ mean[:, :, None]).reshape(-1)
