"""Observations keep at least 8 bits, whatever a scheme gives to the activations between layers.

The precision of the input decides how much reward survives: with 2 to 3-bit weights and activations, policies
keep their return where observations have 3 to 8 bits (Kresse and Lampert 2026). Widening one small tensor
costs a runtime nothing, so ``w2a4`` means: 2-bit weights, 4-bit activations, 8-bit observations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from torch import nn

from rlquant.control.actor import Actor
from rlquant.quant import Scheme, quantizable, unsigned

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
    actor: Actor, scheme: Scheme, verb: Callable[[nn.Module, Scheme, Collection[str]], object]
) -> None:
    """Call ``verb(actor, scheme, skip)`` for the layers under ``scheme``, then for those of the observations.

    Args:
        actor: a float network, changed in place by the verb.
        scheme: what its layers become.
        verb: replaces every float layer not in ``skip``: ``quantize_``, ``prepare_qat_``, ``prepare_empty_``.
    """
    first = observation_layers(actor)
    if scheme.activations is None or scheme.activations.bits >= OBSERVATION_BITS or not first:
        verb(actor, scheme, ())
        return
    if len(first) < len(quantizable(actor)):
        verb(actor, scheme, first)
    verb(actor, replace(scheme, activations=unsigned(OBSERVATION_BITS)), ())
