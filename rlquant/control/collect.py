"""On-policy inputs of a network: what calibration and the comparison of actions are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlquant.control.agent import Agent
from rlquant.control.rollout import EnvPool, rollout
from rlquant.control.session import Session, batch_of_one

__all__ = ["CALIBRATION_SEED", "Inputs", "collect", "joined_states", "raw_observations"]

CALIBRATION_SEED = 1_000_000_000
"""Added to the seed of calibration episodes, so that they are never among those that score a policy."""


@dataclass(frozen=True)
class Inputs:
    """Network inputs seen along episodes.

    Attributes:
        parts: float32 ``[n, *shape]`` by observation key.
        state: recurrent state that entered each step, ``[layers, n, hidden]`` each, or None.
    """

    parts: dict[str, Tensor]
    state: Any

    def batches(self, rows: int = 1024) -> list[tuple[dict[str, Tensor], Any]]:
        """Arguments of the actor, at most ``rows`` at a time."""
        count = len(next(iter(self.parts.values())))
        return [
            ({key: x[i : i + rows] for key, x in self.parts.items()}, _columns(self.state, i, i + rows))
            for i in range(0, count, rows)
        ]

    def outputs(self, actor: torch.nn.Module) -> np.ndarray:
        """Head outputs float32 ``[n, outputs]`` of an actor on these inputs."""
        with torch.no_grad():
            return torch.cat([actor(parts, state)[0] for parts, state in self.batches()]).numpy()


class _Thinned:
    """Keeps every k-th step; k doubles whenever more than ``limit`` rows have come together."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: list[tuple[dict[str, Tensor], Any]] = []
        self._stride, self._seen = 1, 0

    def __call__(self, parts: dict[str, Tensor], state: Any, rows: np.ndarray) -> None:
        if self._seen % self._stride == 0:
            self.kept.append(({key: x.cpu().clone() for key, x in parts.items()}, _columns(state, 0, None)))
        self._seen += 1
        if sum(len(next(iter(parts.values()))) for parts, _ in self.kept) > self.limit and len(self.kept) > 1:
            self.kept = self.kept[::2]
            self._stride *= 2


def collect(
    agent: Agent, episodes: int, *, seed: int, limit: int = 8192, pool: EnvPool | None = None
) -> Inputs:
    """Network inputs of ``episodes`` on-policy episodes, evenly thinned to about ``limit`` rows.

    Args:
        agent: the policy that acts.
        episodes: how many, seeded ``seed + i``.
        seed: of the first.
        limit: rows to keep at most.
        pool: environments to reuse.
    """
    thinned = _Thinned(limit)
    rollout(agent, range(episodes), seed=seed, pool=pool, recorder=thinned)
    parts = {key: torch.cat([kept[key] for kept, _ in thinned.kept]) for key in agent.parts}
    states = [state for _, state in thinned.kept]
    return Inputs(parts, joined_states(states))


def raw_observations(agent: Agent, *, seed: int, count: int = 256, pool: EnvPool | None = None) -> list[Any]:
    """Observations as the environment shows them along one on-policy episode: what a latency is timed on."""
    own = pool or EnvPool(agent.env)
    env = own.take(1)[0]
    session = Session(agent, rows=1)
    starts = np.ones(1, bool)
    observation, _ = env.reset(seed=seed)
    seen = []
    for _ in range(count):
        seen.append(observation)
        masks = np.asarray(env.get_wrapper_attr("action_masks")())[None] if agent.masked else None
        action = session.act(batch_of_one(observation), starts, masks=masks)[0]
        starts[:] = False
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    if pool is None:
        own.close()
    return seen


def _columns(state: Any, first: int, last: int | None) -> Any:
    if state is None:
        return None
    if isinstance(state, tuple):
        return tuple(_columns(part, first, last) for part in state)
    return state[:, first:last].cpu().clone()


def joined_states(states: list[Any]) -> Any:
    """States ``[layers, n, hidden]`` of one kind (a tensor, a pair or None) joined along ``n``."""
    if states[0] is None:
        return None
    if isinstance(states[0], tuple):
        return tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))
    return torch.cat(states, dim=1)
