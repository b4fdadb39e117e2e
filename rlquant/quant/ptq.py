"""The one verb: ``quantize_`` replaces every Linear, Conv2d, LSTM and GRU by its quantized twin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from rlquant.errors import InputError, unknown_name
from rlquant.quant.bench import Bench
from rlquant.quant.calibrate import Calibration
from rlquant.quant.kinds import QUANTIZED_TYPES, empty_layer
from rlquant.quant.methods import Method, get_method
from rlquant.quant.pipeline import run_method
from rlquant.quant.rewrites import Link
from rlquant.quant.scheme import Scheme

__all__ = [
    "as_scheme",
    "layer_schemes",
    "prepare_empty_",
    "quantizable",
    "quantize_",
    "replace_layers",
    "select_layers",
]


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
    schemes: Mapping[str, str | Scheme] | None = None,
    sequential: bool = True,
    links: Sequence[Link] | None = None,
) -> nn.Module:
    """Quantize ``module`` in place and return it (its replacement, where the module is itself such a layer).

    Args:
        module: any network of Linear, Conv2d, LSTM or GRU layers; other layers stay as they are.
        scheme: a Scheme or its name. ``fp32`` changes nothing.
        method: how codes are chosen: a name of ``METHODS``, or several joined as in ``cle+gptq+bias``.
        calibration: inputs of the module, for schemes with static activations and for methods that look at
            inputs: an iterable whose items are tuples of positional arguments or single arguments, or one
            tensor.
        skip: layers to leave alone: qualified names, names of a parent, or patterns such as ``critic*``.
        schemes: schemes of single layers, named as in ``skip``; of several that match, the last counts. One
            call for all layers lets later ones make up for the error of earlier ones, unlike several calls.
        sequential: methods that look at inputs see each layer's as the layers quantized before it make them;
            False shows them those of the float network.
        links: where scales can be folded, besides what can be read off ``nn.Sequential`` (see
            :func:`~rlquant.quant.find_links`, whose result they replace).

    Raises:
        InputError: for an unknown scheme, method or skip name, a scheme that the method cannot do, missing or
            unusable calibration, NaN or Inf in a weight (the layer is named), or where nothing is left to
            quantize. The module is then unchanged.

    Warns:
        CalibrationWarning: where the data does not suffice for the method; it says what was done instead.
    """
    chosen = get_method(method)
    by_layer = layer_schemes(module, as_scheme(scheme), skip, schemes)
    if not by_layer:
        return module
    if calibration is None:
        for each in by_layer.values():
            if each.needs_calibration or chosen.needs_calibration:
                raise InputError(_missing_calibration(each, chosen))
    bench = Bench(module, by_layer, calibration, links)
    run_method(bench, chosen, sequential=sequential)
    return replace_layers(module, bench.originals, bench.finished)


def prepare_empty_(
    module: nn.Module,
    scheme: str | Scheme,
    skip: Collection[str] = (),
    schemes: Mapping[str, str | Scheme] | None = None,
) -> nn.Module:
    """Swap in quantized layers without weights, for ``load_state_dict`` to restore a quantized module.

    Same arguments, result and errors as :func:`quantize_`.
    """
    by_layer = layer_schemes(module, as_scheme(scheme), skip, schemes)
    layers = {name: module.get_submodule(name) for name in by_layer}
    return replace_layers(module, layers, lambda name: empty_layer(layers[name], by_layer[name]))


def layer_schemes(
    module: nn.Module, scheme: Scheme, skip: Collection[str], schemes: Mapping[str, str | Scheme] | None
) -> dict[str, Scheme]:
    """What each layer becomes; those that stay fp32 are left out."""
    if scheme.is_identity and not schemes:
        return {}
    layers = select_layers(module, skip)
    by_layer = dict.fromkeys(layers, scheme)
    for pattern, other in (schemes or {}).items():
        matching = [name for name in layers if _matches(name, pattern)]
        if not matching:
            raise unknown_name("layer in schemes:", pattern, layers)
        by_layer |= dict.fromkeys(matching, as_scheme(other))
    return {name: each for name, each in by_layer.items() if not each.is_identity}


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


def _missing_calibration(scheme: Scheme, method: Method) -> str:
    if not scheme.needs_calibration:
        return f"method {method.name!r} needs calibration data: pass calibration=[inputs, ...]"
    message = f"{scheme.name} needs calibration data to fix its ranges: pass calibration=[inputs, ...]"
    return message if method.needs_calibration else f"{message}, or take {_dynamic(scheme).name}"


def replace_layers(
    module: nn.Module, layers: Mapping[str, nn.Module], make: Callable[[str], nn.Module]
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
