"""The one verb: ``quantize_`` replaces every Linear, Conv2d, LSTM and GRU by its quantized twin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from rlquant.errors import InputError, unknown_name
from rlquant.quant.calibrate import Calibration, InputStatistic, RangeStatistic, run_calibration
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.methods import QUANTIZED_TYPES, Method, Site, empty_layer, get_method
from rlquant.quant.scheme import Scheme

__all__ = ["as_scheme", "prepare_empty_", "quantizable", "quantize_", "replace_layers", "select_layers"]


def quantizable(module: nn.Module) -> dict[str, nn.Module]:
    """The float layers that can be quantized, by qualified name (``""`` for the module itself)."""
    return {name: layer for name, layer in module.named_modules() if type(layer) in QUANTIZED_TYPES}


def quantize_(
    module: nn.Module,
    scheme: str | Scheme,
    *,
    method: str = "rtn",
    calibration: Calibration | None = None,
    skip: Collection[str] = (),
) -> nn.Module:
    """Quantize ``module`` in place and return it (its replacement, where the module is itself such a layer).

    Args:
        module: any network of Linear, Conv2d, LSTM or GRU layers; other layers stay as they are.
        scheme: a Scheme or its name. ``fp32`` changes nothing.
        method: how codes are chosen, a name of ``METHODS``.
        calibration: inputs of the module for schemes with static activations: an iterable whose items are
            tuples of positional arguments or single arguments, or one tensor.
        skip: layers to leave alone: qualified names, names of a parent, or patterns such as ``critic*``.

    Raises:
        InputError: for an unknown scheme, method or skip name, missing or unusable calibration, NaN or Inf in
        a
            weight (the layer is named), or where nothing is left to quantize. The module is then unchanged.
    """
    scheme, chosen = as_scheme(scheme), get_method(method)
    if scheme.is_identity:
        return module
    layers = select_layers(module, skip)
    ranges, statistics = _calibrate(module, scheme, chosen, calibration, layers)
    return replace_layers(
        module, layers, lambda name: _quantized(name, layers, scheme, chosen, ranges, statistics)
    )


def prepare_empty_(module: nn.Module, scheme: str | Scheme, skip: Collection[str] = ()) -> nn.Module:
    """Swap in quantized layers without weights, for ``load_state_dict`` to restore a quantized module.

    Same arguments, result and errors as :func:`quantize_`.
    """
    scheme = as_scheme(scheme)
    if scheme.is_identity:
        return module
    layers = select_layers(module, skip)
    return replace_layers(module, layers, lambda name: empty_layer(layers[name], scheme))


def as_scheme(scheme: str | Scheme) -> Scheme:
    """A scheme, or the one of that name."""
    return scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme)


def select_layers(module: nn.Module, skip: Collection[str]) -> dict[str, nn.Module]:
    """The layers to quantize: all that can be, less those named in ``skip``."""
    layers = quantizable(module)
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in layers):
            raise unknown_name("layer in skip:", pattern, layers)
    chosen = {name: layer for name, layer in layers.items() if not any(_matches(name, p) for p in patterns)}
    if not chosen:
        kinds = ", ".join(kind.__name__ for kind in QUANTIZED_TYPES)
        left = f" besides those in skip ({', '.join(patterns)})" if patterns else ""
        raise InputError(f"{type(module).__name__} has no layer to quantize{left}: supported are {kinds}")
    return chosen


def _dynamic(scheme: Scheme) -> Scheme:
    return replace(scheme, dynamic=True, activation_observer="minmax")


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _calibrate(
    module: nn.Module,
    scheme: Scheme,
    method: Method,
    calibration: Calibration | None,
    layers: Mapping[str, nn.Module],
) -> tuple[dict[str, RangeStatistic], dict[str, InputStatistic]]:
    """Gather activation ranges (static schemes) and the method's statistic (where it has one) in one pass."""
    ranges: dict[str, RangeStatistic] = {}
    statistics: dict[str, InputStatistic] = {}
    if scheme.needs_calibration:
        ranges = {name: RangeStatistic(name, layer, scheme) for name, layer in layers.items()}
    if method.statistic is not None:
        statistics = {name: method.statistic(layer) for name, layer in layers.items()}
    if not ranges and not statistics:
        return ranges, statistics
    if calibration is None:
        raise InputError(
            f"{scheme.name} needs calibration data to fix its ranges: pass calibration=[inputs, ...]"
            + (f", or take {_dynamic(scheme).name}" if ranges else "")
        )
    both = {name: [part[name] for part in (ranges, statistics) if name in part] for name in layers}
    run_calibration(module, calibration, layers, both)
    return ranges, statistics


def _quantized(
    name: str,
    layers: Mapping[str, nn.Module],
    scheme: Scheme,
    method: Method,
    ranges: Mapping[str, RangeStatistic],
    statistics: Mapping[str, InputStatistic],
) -> QuantizedLayer:
    try:
        layer = method.replace(Site(name, layers[name], scheme, statistics.get(name)))
    except InputError as error:
        raise InputError(f"layer {name or type(layers[name]).__name__!r}: {error}") from error
    if name in ranges:
        layer.set_activations(ranges[name].qparams())
    return layer


def replace_layers(
    module: nn.Module, layers: Mapping[str, nn.Module], make: Callable[[str], QuantizedLayer]
) -> nn.Module:
    """Make every replacement first, so that an error changes nothing; then put them in place."""
    made = {id(layer): make(name).train(layer.training) for name, layer in layers.items()}
    if id(module) in made:
        return made[id(module)]
    for parent in list(module.modules()):
        # Not named_children, which gives a layer once however many names share it.
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return module
