"""Which runtime plays and times an agent: ``auto`` is decided agent by agent, and never in silence."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from rlquant.control.agent import Agent
from rlquant.control.collect import raw_observations
from rlquant.control.compile import compile_agent
from rlquant.control.observation import FrameStack
from rlquant.control.rollout import EnvPool
from rlquant.control.session import batch_of_one
from rlquant.deploy.auto import Choice, choose_runtime
from rlquant.deploy.runtime import RUNTIMES
from rlquant.errors import InputError
from rlquant.quant import QuantizedWeight

__all__ = [
    "AUTO_RUNTIME",
    "RUNTIME_CHOICES",
    "RuntimeChooser",
    "is_simulated",
    "stacked_observations",
    "tell_passed_over",
]

AUTO_RUNTIME = "auto"
RUNTIME_CHOICES = (AUTO_RUNTIME, "torch", *RUNTIMES)
_STEPS = 64


class RuntimeChooser:
    """Chooses the runtime of each precision of one agent.

    Args:
        reference: the fp32 agent, on whose way the runtimes are compared.
        pool: its environments.
        seed: of the episode.
        runtime: one of :data:`RUNTIME_CHOICES`; only ``auto`` leaves anything to choose.
        device: of torch. Any but the CPU was asked for to run torch on it.
    """

    def __init__(self, reference: Agent, pool: EnvPool, *, seed: int, runtime: str, device: str) -> None:
        self.reference, self.pool, self.seed = reference, pool, seed
        self.runtime = "torch" if runtime == AUTO_RUNTIME and device != "cpu" else runtime
        self._observations: dict[str, np.ndarray] | None = None

    def choose(self, agent: Agent) -> Choice:
        """The runtime of ``agent``; torch where its network cannot be compiled into a program."""
        if self.runtime != AUTO_RUNTIME:
            return Choice(self.runtime)
        try:
            program = compile_agent(agent)
        except InputError as error:
            return Choice("torch", (str(error),))
        if self._observations is None:
            seen = raw_observations(self.reference, seed=self.seed, count=_STEPS, pool=self.pool)
            self._observations = stacked_observations(self.reference, seen)
        return choose_runtime(program, self._observations)


def is_simulated(agent: Agent, runtime: str) -> bool:
    """Whether a runtime computes with other weights than the packed low-bit ones.

    torch always does; a program does with those that are no integers symmetric about zero, such as bf16 or nf4.
    """
    packed = [part.scheme for part in agent.actor.modules() if isinstance(part, QuantizedWeight)]
    return any(
        runtime == "torch" or scheme.weights.kind != "int" or not scheme.symmetric for scheme in packed
    )


def stacked_observations(agent: Agent, seen: list[Any]) -> dict[str, np.ndarray]:
    """What a program of ``agent`` is given along an episode: ``[n, *shape]`` by key, frames stacked.

    Args:
        agent: whose observations they are.
        seen: one after the other, as the environment shows them, from the first of an episode on.
    """
    batches = [batch_of_one(observation) for observation in seen]
    parts = {
        key: [batch[key] if isinstance(batch, dict) else batch for batch in batches] for key in agent.parts
    }
    for key, part in agent.parts.items():
        if part.stack > 1:
            frames = FrameStack(part, 1)
            parts[key] = [frames.push(x, np.array([i == 0])).copy() for i, x in enumerate(parts[key])]
    return {key: np.concatenate(steps) for key, steps in parts.items()}


def tell_passed_over(choices: Iterable[tuple[str, Choice]]) -> None:
    """One line on stderr for each reason to pass a faster runtime over, with all precisions that it concerns."""
    concerned: dict[Choice, list[str]] = {}
    for precision, choice in choices:
        if choice.passed_over:
            concerned.setdefault(choice, []).append(precision)
    for choice, precisions in concerned.items():
        verb = "runs" if len(precisions) == 1 else "run"
        reasons = "; ".join(choice.passed_over)
        sys.stderr.write(f"rlquant: {', '.join(precisions)} {verb} in {choice.name}: {reasons}\n")
