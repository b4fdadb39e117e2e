"""The method ``auto``: which training-free method keeps the most of this agent under this scheme?

No method is best for all policies: GPTQ makes up for rounding, AWQ protects what the inputs make important,
and some agents are best rounded to nearest. Trying is cheap. Each candidate plays the same selection episodes,
whose seeds never score a policy; the highest mean return wins, and of equals the one whose outputs are nearest
to the fp32 agent's (:mod:`~rlquant.control.imitation`) on the calibration inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlquant.control.agent import Agent
from rlquant.control.collect import Inputs
from rlquant.control.distill import SELECTION_SEED
from rlquant.control.imitation import imitation_loss
from rlquant.control.methods import parse_method
from rlquant.control.rollout import EnvPool, rollout
from rlquant.quant import MixedScheme

__all__ = ["SELECTION_EPISODES", "candidates", "choose_method", "divergence"]

SELECTION_EPISODES = 32

_CANDIDATES = ("rtn", "mse", "gptq", "awq", "awq+gptq", "cle+awq+gptq", "smoothquant+gptq")


def candidates(agent: Agent, scheme: MixedScheme) -> list[str]:
    """Training-free methods that can do the scheme, with the head centred where that is exact."""
    center = "center+" if agent.head.kind == "argmax" else ""
    return [center + name for name in _CANDIDATES if parse_method(name).can(scheme)]


def choose_method(
    agent: Agent,
    names: list[str],
    quantize: Callable[[str], Agent],
    inputs: Inputs,
    *,
    seed: int,
    pool: EnvPool,
) -> str:
    """The best of several methods.

    Args:
        agent: in fp32.
        names: of the methods to try.
        quantize: makes the agent of a method.
        inputs: on-policy inputs of the fp32 agent.
        seed: of the evaluation that will follow.
        pool: its environments.
    """
    scores = {}
    for name in names:
        quantized = quantize(name)
        played = rollout(quantized, range(SELECTION_EPISODES), seed=seed + SELECTION_SEED, pool=pool)
        scores[name] = (float(played.returns.mean()), -divergence(agent, quantized, inputs))
    return max(names, key=scores.__getitem__)


def divergence(agent: Agent, quantized: Agent, inputs: Inputs) -> float:
    """How far a quantized agent's outputs are from the fp32 agent's, see :mod:`~rlquant.control.imitation`."""
    labels, outputs = (torch.from_numpy(inputs.outputs(each.actor)) for each in (agent, quantized))
    return float(imitation_loss(agent.head, labels)(outputs, labels))
