"""Sensitivity: what does it cost to quantize one tensor alone, with all others in float?

Tensors are the weights of each layer and the input of each layer; the first input is the observation. The cost
is told twice: by how far the outputs move on the fp32 agent's own inputs (:mod:`~rlquant.control.imitation`),
which is smooth and cheap, and by the reward that is kept in a few episodes, which is what counts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rlquant.control.actor import Actor
from rlquant.control.agent import Agent
from rlquant.control.choose import divergence
from rlquant.control.input_bits import observation_layers
from rlquant.control.quantizer import Quantizer
from rlquant.measure import Sensitivity
from rlquant.quant import MixedScheme, Scheme, quantizable

__all__ = ["BITS", "best_method", "roles", "sensitivities"]

BITS = (8, 4, 3, 2)
_EXACT_BITS = 16  # of weights beside a quantized input: activations are integers beside integers


def sensitivities(
    quantizer: Quantizer, *, play: Callable[[Agent], float] | None = None, bits: tuple[int, ...] = BITS
) -> list[Sensitivity]:
    """Sensitivity of every tensor at each number of bits, in the network's order.

    Args:
        quantizer: of the fp32 agent.
        play: from an agent to the share of reward that it keeps; None plays nothing.
        bits: to try.
    """
    agent, method = quantizer.agent, best_method(quantizer.agent)
    found = []
    for layer, role in roles(agent.actor).items():
        for tensor in ("weights", "input"):
            for count in bits:
                name = f"int{count}" if tensor == "weights" else f"w{_EXACT_BITS}a{count}"
                scheme = MixedScheme(Scheme.parse("fp32"), ((layer, Scheme.parse(name)),))
                quantized = quantizer.quantize(scheme, method if tensor == "weights" else "rtn")
                moved = divergence(agent, quantized, quantizer.inputs())
                kept = play(quantized) if play is not None else None
                found.append(Sensitivity(layer, role, tensor, count, moved, kept))
    return found


def roles(actor: Actor) -> dict[str, str]:
    """The role of each layer that can be quantized, by qualified name: ``observation`` (a first layer), ``head`` (the
    last one) or ``hidden``."""
    first = observation_layers(actor)
    names = list(quantizable(actor))
    last = [name for name in names if isinstance(actor.get_submodule(name), nn.Linear)][-1:]
    return {name: "observation" if name in first else "head" if name in last else "hidden" for name in names}


def best_method(agent: Agent) -> str:
    """The training-free method to compare tensors with: GPTQ, with the head centred where that is exact."""
    return "center+gptq" if agent.head.kind == "argmax" else "gptq"
