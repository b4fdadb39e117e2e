"""Closed-loop calibration: ranges from the states that the quantized policy itself reaches.

The fp32 policy's episodes do not show where its quantized copy will go: errors compound, and a policy that
limps sees states that a healthy one never does, outside the ranges that were calibrated. So the agent is
quantized, rolled out, and quantized again with its own episodes added, and each round says how far the
observations have moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlquant.control.agent import Agent
from rlquant.control.collect import CALIBRATION_SEED, Inputs, collect, joined_states
from rlquant.control.quantize import quantize_agent
from rlquant.control.rollout import EnvPool
from rlquant.errors import InputError
from rlquant.quant import MixedScheme, Scheme

__all__ = ["ClosedLoop", "Shift", "observation_shift", "quantize_in_closed_loop"]


@dataclass(frozen=True)
class Shift:
    """How far network inputs have moved between two sets of episodes, by observation key.

    Attributes:
        mean: float64 ``[features]``: difference of the means, in standard deviations of the reference.
        wasserstein: float64 ``[features]``: Wasserstein-1 distance, in the same unit. It is 0 for equal
            distributions, at least ``|mean|``, and the average way a value has to be carried.
        outside: float64 ``[features]``: share of the new values beyond the reference's extremes.
    """

    mean: dict[str, NDArray[np.float64]]
    wasserstein: dict[str, NDArray[np.float64]]
    outside: dict[str, NDArray[np.float64]]

    @property
    def worst(self) -> float:
        """The largest Wasserstein-1 distance of any feature."""
        return max(float(distance.max()) for distance in self.wasserstein.values())

    @property
    def share_outside(self) -> float:
        """Share of all new values that lie beyond the reference's extremes of their feature."""
        return float(np.concatenate(list(self.outside.values())).mean())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        names = ("mean", "wasserstein", "outside")
        return {name: {key: x.tolist() for key, x in getattr(self, name).items()} for name in names}


@dataclass(frozen=True)
class ClosedLoop:
    """The outcome of a closed-loop calibration.

    Attributes:
        agent: the agent as quantized last.
        inputs: what it was calibrated with, fp32 and quantized episodes together.
        shifts: of each round's quantized episodes against what had been calibrated before it.
    """

    agent: Agent
    inputs: Inputs
    shifts: tuple[Shift, ...]


def quantize_in_closed_loop(
    agent: Agent,
    scheme: str | Scheme | MixedScheme,
    *,
    method: str = "rtn",
    rounds: int = 1,
    episodes: int = 8,
    seed: int = 0,
    pool: EnvPool | None = None,
    inputs: Inputs | None = None,
) -> ClosedLoop:
    """Quantize, play, and quantize again with what the quantized agent met.

    Args:
        agent: an fp32 agent.
        scheme: what weights and activations become.
        method: as for :func:`~rlquant.control.quantize_agent`.
        rounds: how often the quantized agent plays.
        episodes: of the fp32 agent, and of each round. All have seeds that never score a policy.
        seed: of the whole.
        pool: environments to reuse.
        inputs: of the fp32 agent's ``episodes`` under ``seed``, where they have been collected already.

    Raises:
        InputError: fewer than one round or episode, or as ``quantize_agent``.
    """
    if rounds < 1 or episodes < 1:
        raise InputError(
            f"a closed loop needs at least one round and one episode, not {min(rounds, episodes)}"
        )
    own = pool or EnvPool(agent.env)
    first = seed + CALIBRATION_SEED
    try:
        inputs = inputs or collect(agent, episodes, seed=first, pool=own)
        quantized = quantize_agent(agent, scheme, method=method, inputs=inputs)
        shifts = []
        for number in range(1, rounds + 1):
            met = collect(quantized, episodes, seed=first + number * episodes, pool=own)
            shifts.append(observation_shift(inputs, met))
            inputs = _merged(inputs, met)
            quantized = quantize_agent(agent, scheme, method=method, inputs=inputs)
    finally:
        if pool is None:
            own.close()
    return ClosedLoop(quantized, inputs, tuple(shifts))


def observation_shift(reference: Inputs, met: Inputs) -> Shift:
    """How far ``met`` lies from ``reference``; features are flattened in row-major order.

    A feature that is constant in the reference is measured in its own unit.
    """
    mean, wasserstein, outside = {}, {}, {}
    for key in reference.parts:
        before, after = (_columns(inputs.parts[key]) for inputs in (reference, met))
        unit = before.std(axis=0)
        unit[unit == 0] = 1.0
        mean[key] = (after.mean(axis=0) - before.mean(axis=0)) / unit
        wasserstein[key] = _wasserstein(before, after) / unit
        beyond = (after < before.min(axis=0)) | (after > before.max(axis=0))
        outside[key] = beyond.mean(axis=0)
    return Shift(mean, wasserstein, outside)


def _wasserstein(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """The integral of ``|F_before - F_after|`` of each column, ``[features]``; the samples may differ in size."""
    distances = np.zeros(before.shape[1])
    for column in range(before.shape[1]):
        a, b = np.sort(before[:, column]), np.sort(after[:, column])
        points = np.sort(np.concatenate([a, b]))
        gap = np.searchsorted(a, points[:-1], side="right") / len(a)
        gap -= np.searchsorted(b, points[:-1], side="right") / len(b)
        distances[column] = np.sum(np.abs(gap) * np.diff(points))
    return distances


def _columns(x: Tensor) -> NDArray[np.float64]:
    columns: NDArray[np.float64] = x.flatten(1).double().numpy()
    return columns


def _merged(first: Inputs, second: Inputs) -> Inputs:
    parts = {key: torch.cat([x, second.parts[key]]) for key, x in first.parts.items()}
    return Inputs(parts, joined_states([first.state, second.state]))
