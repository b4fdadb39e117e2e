"""Observations keep at least 8 bits, whatever a scheme gives to the activations between layers.

The precision of the input decides how much reward survives: with 2 to 3-bit weights and activations, policies
keep their return where observations have 3 to 8 bits (Kresse and Lampert 2026). Widening one small tensor
costs a runtime nothing, so ``w2a4`` means: 2-bit weights, 4-bit activations, 8-bit observations. A layer that
a mixed scheme names gets what is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from rlquant.control.actor import Actor
from rlquant.quant import MixedScheme, Scheme, quantizable, unsigned

__all__ = ["OBSERVATION_BITS", "apply_scheme_", "observation_layers"]

OBSERVATION_BITS = 8


def observation_layers(actor: Actor) -> list[str]:
    """Qualified names of the float layers that observations reach first, before quantization.

    The first layer of each encoder, and what follows the encoders where one has no layer of its own. An LSTM
    or GRU counts as one layer.
    """
    layers = list(quantizable(actor))
    core = [name for name in layers if not name.startswith("encoders.")][:1]
    found: list[str] = []
    for prefix in actor.encoders:
        own = [name for name in layers if name.startswith(f"encoders.{prefix}.")]
        found += own[:1] or core
    return list(dict.fromkeys(found))


def apply_scheme_(
    actor: Actor, scheme: MixedScheme, verb: Callable[[nn.Module, Scheme, Mapping[str, Scheme]], object]
) -> None:
    """Call ``verb(actor, base, schemes)`` with the schemes of the layers that differ from the base.

    Args:
        actor: a float network, changed in place by the verb.
        scheme: what its layers become.
        verb: ``quantize_``, ``prepare_qat_`` or ``prepare_empty_``, with ``schemes`` as they take it.
    """
    base = scheme.base
    schemes: dict[str, Scheme] = {}
    if base.activations is not None and base.activations.bits < OBSERVATION_BITS:
        wider = replace(base, activations=unsigned(OBSERVATION_BITS))
        schemes = dict.fromkeys(observation_layers(actor), wider)
    verb(actor, base, schemes | dict(scheme.exceptions))
