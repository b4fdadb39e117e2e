"""The registry of post-training methods: how the codes of a layer are chosen.

A new method is one small file with a function from :class:`Site` to the replacement layer, and a line in
``METHODS``. It gets the layer, the scheme and, through ``statistic``, whatever it wants to gather from the
layer's inputs during calibration (for GPTQ, ``X^T X``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlquant.errors import unknown_name
from rlquant.quant.calibrate import InputStatistic
from rlquant.quant.layers import QuantConv2d, QuantizedLayer, QuantLinear
from rlquant.quant.recurrent import QuantGRU, QuantLSTM
from rlquant.quant.scheme import Scheme

__all__ = ["METHODS", "Method", "Site", "empty_layer", "get_method"]

# Exact types: a subclass may compute something else, and replacing it would change the network.
QUANTIZED_TYPES: dict[type[nn.Module], Callable[[Any, Scheme], QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
}


@dataclass(frozen=True)
class Site:
    """A float layer to replace: its qualified name, the scheme and the gathered statistic."""

    name: str
    layer: nn.Module
    scheme: Scheme
    statistic: InputStatistic | None = None


@dataclass(frozen=True)
class Method:
    """``replace`` makes the quantized layer of a site; ``statistic``, if any, makes what gathers its inputs.

    A method with a statistic needs calibration data.
    """

    replace: Callable[[Site], QuantizedLayer]
    statistic: Callable[[nn.Module], InputStatistic] | None = None


def empty_layer(layer: nn.Module, scheme: Scheme) -> QuantizedLayer:
    """The quantized layer of the same kind and sizes as ``layer``, on its device, still without weights."""
    device = next(layer.parameters()).device
    empty = QUANTIZED_TYPES[type(layer)](layer, scheme)
    return empty.to(device)


def round_to_nearest(site: Site) -> QuantizedLayer:
    """RTN: every weight takes the nearest code, independently of the others."""
    layer = empty_layer(site.layer, site.scheme)
    layer.load_float(site.layer)
    return layer


METHODS: dict[str, Method] = {"rtn": Method(round_to_nearest)}


def get_method(name: str) -> Method:
    """The method called ``name``. Raises InputError that lists the methods."""
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]
