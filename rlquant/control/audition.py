"""Auditions: quick, paired tries of many candidates, on episodes that never score a policy.

A search looks at many schemes and keeps the lucky ones, so what it has looked at proves nothing: the winner
plays again, on the evaluation's own seeds. Here it is enough to sort out. A candidate that is clearly good or
clearly bad stops early; the doubtful one plays on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlquant.control.agent import Agent
from rlquant.control.collect import CALIBRATION_SEED
from rlquant.control.distill import SELECTION_SEED
from rlquant.control.pieces import Memory, Pieces
from rlquant.control.rollout import EnvPool, rollout
from rlquant.measure import compare

__all__ = ["AUDITION_SEED", "Audition", "Heard"]

AUDITION_SEED = SELECTION_SEED + CALIBRATION_SEED // 2
"""Added to the seed of auditions: they share no episode with calibration, teaching, selection or evaluation."""

_CONFIDENCE = 0.8


@dataclass(frozen=True)
class Heard:
    """What an audition came to.

    Attributes:
        retention: share of the reward that is kept; NaN where fp32 itself is no better than random.
        episodes: that were played.
        passed: whether the share is at least what was asked for, by the interval or at last by the value.
    """

    retention: float
    episodes: int
    passed: bool


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
        for episodes in stages:
            reference = self._returns(self.agent, "audition-fp32", episodes)
            found = compare(
                reference,
                self._returns(candidate, name, episodes),
                random_score=self.random_score,
                margin=max(0.0, 1 - retain),
                confidence=_CONFIDENCE,
            )
            if found.verdict != "undecided":
                break
        passed = found.verdict == "retained" or (found.verdict == "undecided" and found.value >= retain)
        return Heard(found.value, episodes, passed)

    def _returns(self, agent: Agent, name: str, episodes: int) -> np.ndarray:
        returns: list[float] = (self.pieces.piece(name) or {"returns": []})["returns"]
        if len(returns) < episodes:
            more = rollout(agent, range(len(returns), episodes), seed=self.seed, pool=self.pool)
            returns = [*returns, *more.returns.tolist()]
            self.pieces.save_piece(name, {"returns": returns})
        return np.asarray(returns[:episodes])
