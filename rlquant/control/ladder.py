"""The ladder: mixed-precision schemes from 8 bits everywhere down to 2, by the sensitivity of each layer.

Activations keep 8 bits, for they cost no bytes.
"""

from __future__ import annotations

from rlquant.control.agent import Agent
from rlquant.control.sensitivity import BITS, roles
from rlquant.measure import Sensitivity
from rlquant.quant import MixedScheme, Scheme, Step, greedy_ladder

__all__ = ["ladder"]


def ladder(agent: Agent, found: list[Sensitivity]) -> list[MixedScheme]:
    """Mixed schemes from 8 bits everywhere down to 2, each one layer's step below the last.

    Args:
        agent: in fp32.
        found: its sensitivities; those of weights decide.
    """
    cost = {(each.layer, each.bits): each.divergence for each in found if each.tensor == "weights"}
    layers = {name: agent.actor.get_submodule(name) for name in roles(agent.actor)}
    weights = {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    parts = {name: [Step(count * bits, cost[name, bits]) for bits in BITS] for name, count in weights.items()}
    return [_scheme({name: BITS[index] for name, index in rung.items()}) for rung in greedy_ladder(parts)]


def _scheme(bits: dict[str, int]) -> MixedScheme:
    """8-bit activations; the commonest weight bits are the base, the rest exceptions."""
    counts = list(bits.values())
    base = max(sorted(set(counts)), key=counts.count)
    others = tuple((name, Scheme.parse(f"w{count}a8")) for name, count in bits.items() if count != base)
    return MixedScheme(Scheme.parse(f"w{base}a8"), others)
