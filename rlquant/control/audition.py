"""Auditions of agents: episodes that never score a policy; see :mod:`rlquant.measure.audition`."""

from __future__ import annotations

import numpy as np

from rlquant.control.agent import Agent
from rlquant.control.collect import CALIBRATION_SEED
from rlquant.control.distill import SELECTION_SEED
from rlquant.control.pieces import Memory, Pieces
from rlquant.control.rollout import EnvPool, rollout
from rlquant.measure import Heard, audition

__all__ = ["AUDITION_SEED", "Audition"]

AUDITION_SEED = SELECTION_SEED + CALIBRATION_SEED // 2
"""Added to the seed of auditions: they share no episode with calibration, teaching, selection or evaluation."""


class Audition:
    """Auditions of candidates against one fp32 agent.

    Args:
        agent: the fp32 agent.
        pool: its environments.
        random_score: mean return of random actions.
        seed: of the evaluation that will follow.
        pieces: keeps what was played; by default in memory.
    """

    def __init__(
        self, agent: Agent, pool: EnvPool, *, random_score: float, seed: int, pieces: Pieces | None = None
    ) -> None:
        self.agent, self.pool, self.random_score = agent, pool, random_score
        self.pieces = pieces or Memory()
        self.seed = seed + AUDITION_SEED

    def hear(self, candidate: Agent, *, retain: float, stages: tuple[int, ...] = (16, 64)) -> Heard:
        """Audition a candidate.

        Args:
            candidate: a quantized copy of the agent.
            retain: share of the reward that it has to keep.
            stages: episodes in all after which it may be decided.
        """
        name = f"audition-{candidate.precision}-{candidate.method}"
        return audition(
            lambda episodes: (
                self._returns(self.agent, "audition-fp32", episodes),
                self._returns(candidate, name, episodes),
            ),
            random_score=self.random_score,
            retain=retain,
            stages=stages,
        )

    def _returns(self, agent: Agent, name: str, episodes: int) -> np.ndarray:
        returns: list[float] = (self.pieces.piece(name) or {"returns": []})["returns"]
        if len(returns) < episodes:
            more = rollout(agent, range(len(returns), episodes), seed=self.seed, pool=self.pool)
            returns = [*returns, *more.returns.tolist()]
            self.pieces.save_piece(name, {"returns": returns})
        return np.asarray(returns[:episodes])
