"""Quantizes an agent: folds the observation's ranges into its first layer, then hands over to ``rlquant.quant``.

Observations are unequal: CartPole's angle spans 0.2, its cart velocity 4. One 8-bit grid for all would leave
the angle a handful of steps. So where activations are quantized, each feature is first mapped to [0, 1] by its
own range, ``x' = (x - low) / (high - low)``, and the first layer's weights absorb the inverse - exact in real
arithmetic. One grid for ``x'`` is then one grid per feature of ``x``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlquant.control.actor import Actor, FeatureMap
from rlquant.control.agent import Agent
from rlquant.control.collect import Inputs
from rlquant.control.input_bits import apply_scheme_
from rlquant.control.methods import parse_method
from rlquant.errors import InputError
from rlquant.measure import WeightHistogram, weight_histogram
from rlquant.quant import (
    MixedScheme,
    QuantizedWeight,
    Scheme,
    center_head_,
    qparams_from_range,
    quantizable,
    quantize_,
    sqnr_db,
)

__all__ = [
    "float_twin",
    "fold_features_",
    "fold_observation_ranges_",
    "quantize_agent",
    "use_whole_grid",
    "weight_histograms",
]

OBSERVATION_HEADROOM = 0.125
"""Widens each feature's calibrated range on both sides by this share: episodes differ in how far they go."""


def quantize_agent(
    agent: Agent,
    scheme: str | Scheme | MixedScheme,
    *,
    method: str = "rtn",
    inputs: Inputs | None = None,
) -> Agent:
    """A quantized copy of an agent; the agent itself stays as it is.

    Args:
        agent: an fp32 agent.
        scheme: what weights and activations become.
        method: a method that needs no training, see :func:`~rlquant.control.methods.parse_method`.
        inputs: on-policy calibration inputs; needed where activations are quantized.

    Raises:
        InputError: inputs are needed and there are none, nothing can be quantized, or the method does not
            fit the scheme or the head, or trains.
    """
    scheme, parsed = MixedScheme.of(scheme), parse_method(method)
    if not parsed.is_plain:
        raise InputError(f"method {method!r} plays episodes: use rlquant.control.Quantizer")
    actor = float_twin(agent, scheme, inputs, center=parsed.center)
    calibration = inputs.batches() if inputs is not None else None
    apply_scheme_(
        actor,
        scheme,
        lambda module, base, schemes: quantize_(
            module, base, method=parsed.layers, calibration=calibration, schemes=schemes
        ),
    )
    use_whole_grid(actor)
    return agent.with_actor(actor, scheme.name, "none" if scheme.is_identity else method)


def float_twin(agent: Agent, scheme: MixedScheme, inputs: Inputs | None, *, center: bool = False) -> Actor:
    """The fp32 network that is quantized: a copy, with observation ranges folded in where that helps.

    Args:
        agent: an fp32 agent.
        scheme: ranges are folded where it quantizes activations.
        inputs: on-policy inputs, for the ranges.
        center: centre the head, see :mod:`~rlquant.control.methods`.

    Raises:
        InputError: the head to be centred is no argmax over a Linear.
    """
    twin = copy.deepcopy(agent.actor)
    if scheme.quantizes_activations and inputs is not None:
        fold_observation_ranges_(twin, inputs.parts)
    if center:
        linear = [module for module in twin.modules() if isinstance(module, nn.Linear)]
        if agent.head.kind != "argmax" or not linear:
            raise InputError(
                f"'center' is exact for an argmax head only; this agent has a {agent.head.kind} head"
            )
        center_head_(linear[-1])
    return twin


def fold_observation_ranges_(actor: Actor, parts: dict[str, Tensor]) -> None:
    """Map each feature to [0, 1] in place, by its range with some headroom; see :func:`fold_features_`.

    Args:
        actor: the network.
        parts: calibration inputs ``[n, *shape]`` by key.
    """
    fold_features_(actor, parts, _unit_range)


def _unit_range(features: Tensor) -> tuple[Tensor, Tensor]:
    """``low`` and ``span`` that map each of ``[n, features]`` into [0, 1] with some headroom."""
    low, high = features.amin(0), features.amax(0)
    margin = OBSERVATION_HEADROOM * (high - low)
    return low - margin, high - low + 2 * margin


def fold_features_(
    actor: Actor, parts: dict[str, Tensor], choose: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> None:
    """Map each feature ``x`` to ``(x - low) / span`` in place and let the first layer absorb the inverse.

    Only observation parts that reach the first layer as they are (flattened, no CNN) are mapped. A network
    whose first layer is not a Linear or an LSTM/GRU is left alone.

    Args:
        actor: the network.
        parts: calibration inputs ``[n, *shape]`` by key.
        choose: from features ``[n, features]`` to ``low`` and ``span``, ``[features]`` each; a span of zero
            becomes one.
    """
    first = actor.rnn if actor.rnn is not None else _first_layer(actor.trunk)
    if first is None:
        return
    column = 0
    for key in actor.keys:
        encoder = actor.encoder(key)
        with torch.no_grad():
            features = encoder(parts[key])
        width = features.shape[1]
        if all(
            isinstance(layer, nn.Flatten | nn.Identity)
            for layer in encoder.modules()
            if not _is_container(layer)
        ):
            low, span = choose(features)
            span = torch.where(span > 0, span, torch.ones_like(span))
            actor.set_encoder(key, nn.Sequential(nn.Flatten(), FeatureMap(low, span)))
            _absorb(first, slice(column, column + width), low, span)
        column += width


def use_whole_grid(actor: Actor) -> None:
    """Give the first layer's input the grid of [0, 1], where every feature was mapped to it.

    Calibration saw only the part of [0, 1] inside the headroom, and would clip there. Where a method scales the
    channels of the input first, the grid reaches to the largest of them. An input without a fixed grid is left
    alone.
    """
    if not all(isinstance(list(actor.encoder(key).modules())[-1], FeatureMap) for key in actor.keys):
        return
    first = actor.rnn if actor.rnn is not None else actor.trunk[0]  # type: ignore[index]
    quantizer: Any = getattr(first, "input_quant" if actor.rnn is None else "input_quant_l0", None)
    if hasattr(quantizer, "set"):  # stored or in training; what is float or dynamic has no grid to set
        quantizer.set(qparams_from_range(torch.zeros(()), _largest_scale(first), quantizer.fmt))


def _largest_scale(layer: Any) -> Tensor:
    """What the largest channel of a layer's input is multiplied by before its grid; outliers stay off the grid."""
    scale: Tensor | None = getattr(layer, "input_scale", None)
    if scale is None:
        return torch.ones(())
    if layer.outlier_index is not None:
        scale = scale.index_fill(0, layer.outlier_index.long(), 0.0)
    return scale.max()


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential)


def _first_layer(trunk: nn.Module) -> nn.Module | None:
    if isinstance(trunk, nn.Sequential) and len(trunk):
        trunk = trunk[0]
    return trunk if isinstance(trunk, nn.Linear) else None


def _absorb(layer: nn.Module, columns: slice, low: Tensor, span: Tensor) -> None:
    """``W x + b`` with ``x = low + span x'``: scale the columns, move the rest into the bias (in float64)."""
    suffix = "" if isinstance(layer, nn.Linear) else "_ih_l0"
    weight: Tensor = getattr(layer, f"weight{suffix}")
    bias: Tensor | None = getattr(layer, f"bias{suffix}")
    with torch.no_grad():
        part = weight[:, columns].double()
        shift = (part @ low.double()).to(weight.dtype)
        weight[:, columns] = (part * span.double()).to(weight.dtype)
        if bias is None:
            layer.bias = nn.Parameter(shift, requires_grad=False)
        else:
            bias += shift


def weight_histograms(before: Actor, after: Actor) -> tuple[WeightHistogram, ...]:
    """How each quantized weight is distributed before and after."""
    histograms = []
    for name, layer in quantizable(before).items():
        quantized = after.get_submodule(name)
        for part, packed in quantized.named_children():
            if isinstance(packed, QuantizedWeight):
                original = getattr(layer, part.replace("packed", "weight")).detach()
                restored = packed.cached()
                label = f"{name}.{part.replace('packed', 'weight')}"
                sqnr = float(sqnr_db(original, restored))
                histograms.append(weight_histogram(label, original.numpy(), restored.numpy(), sqnr_db=sqnr))
    return tuple(histograms)
