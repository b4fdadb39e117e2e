"""The ladder: mixed-precision schemes from 8 bits everywhere down to 2, by the sensitivity of each layer.

From rung to rung one layer's weights go down a step: the layer that adds the least divergence per byte saved (a
greedy knapsack). Activations keep 8 bits, for they cost no bytes.
"""

from __future__ import annotations

from rlquant.control.agent import Agent
from rlquant.control.sensitivity import BITS, Sensitivity, roles
from rlquant.quant import MixedScheme, Scheme

__all__ = ["ladder"]


def ladder(agent: Agent, found: list[Sensitivity]) -> list[MixedScheme]:
    """Mixed schemes from 8 bits everywhere down to 2, each one layer's step below the last.

    Args:
        agent: in fp32.
        found: its sensitivities; those of weights decide.
    """
    cost = {(each.layer, each.bits): each.divergence for each in found if each.tensor == "weights"}
    bits = dict.fromkeys(roles(agent.actor), BITS[0])
    sizes = {name: agent.actor.get_submodule(name) for name in bits}
    weights = {name: sum(p.numel() for p in layer.parameters()) for name, layer in sizes.items()}
    rungs = [_scheme(bits)]
    while any(count > BITS[-1] for count in bits.values()):
        steps = {}
        for name, count in bits.items():
            if count > BITS[-1]:
                lower = BITS[BITS.index(count) + 1]
                added = max(0.0, cost[name, lower] - cost[name, count])
                steps[name] = (added / (weights[name] * (count - lower)), lower)
        name = min(steps, key=lambda each: steps[each])
        bits[name] = steps[name][1]
        rungs.append(_scheme(bits))
    return rungs


def _scheme(bits: dict[str, int]) -> MixedScheme:
    """8-bit activations; the commonest weight bits are the base, the rest exceptions."""
    counts = list(bits.values())
    base = max(sorted(set(counts)), key=counts.count)
    others = tuple((name, Scheme.parse(f"w{count}a8")) for name, count in bits.items() if count != base)
    return MixedScheme(Scheme.parse(f"w{base}a8"), others)
