"""Distillation: the frozen fp32 policy teaches its own quantized copy, in minutes and without any reward.

The student starts as the quantized teacher and is trained, on the grid, to act as the teacher does. Which
states matter is not known beforehand: a student that errs reaches states that the teacher never saw. So the
student's own rollouts are labelled by the teacher and added to the data, round after round (DAgger: Ross et
al. 2011, arXiv:1011.0686). A student of few bits cannot be right everywhere, and what an early, bad student
met is no longer worth its capacity: only the teacher's episodes and those of the last rounds are kept.

No replay buffer and no critic is needed; reward only chooses the best among the later rounds' students, on
selection episodes. Calibration, DAgger and selection episodes have seeds of their own: none ever scores a
policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlquant.control.agent import Agent
from rlquant.control.collect import CALIBRATION_SEED, collect
from rlquant.control.imitation import imitation_loss
from rlquant.control.lessons import Lesson, record, unroll
from rlquant.control.rollout import EnvPool, rollout
from rlquant.control.student import Student
from rlquant.errors import InputError
from rlquant.measure import single_thread
from rlquant.quant import MixedScheme, Scheme

__all__ = ["DAGGER_SEED", "SELECTION_SEED", "TRAINED", "Distillation", "DistillationRound", "distill"]

DAGGER_SEED = 2 * CALIBRATION_SEED
"""Added to the seed of the students' episodes that the teacher labels."""

SELECTION_SEED = 3 * CALIBRATION_SEED
"""Added to the seed of the episodes that choose among students."""

_CALIBRATION_EPISODES = 8
_MAX_EPISODES = 64
_RECURRENT_BATCH = 16  # stretches of 32 steps each


@dataclass(frozen=True)
class Distillation:
    """How a student is taught.

    Attributes:
        rounds: of training, each followed by rollouts of the student.
        steps: optimiser steps of a round.
        batch: inputs of a step, of which ``teacher_share`` come from the teacher's episodes.
        rollout_steps: environment steps that a round's rollouts aim at (1 to 64 episodes); twice as many of
            the teacher's.
        window: the student's rounds that stay in the data.
        teacher_share: see ``batch``.
        lr: Adam's learning rate for weights and biases; all rates fall to zero along a half cosine.
        grid_lr: for scales and zero points, relative changes per step.
        feature_lr: for the relative sizes of the observations.
        selection_episodes: that each student of the second half of the rounds plays.
        observer: the range rule that the student's grids start from.
    """

    rounds: int = 16
    steps: int = 1000
    batch: int = 256
    rollout_steps: int = 8192
    window: int = 2
    teacher_share: float = 0.25
    lr: float = 3e-3
    grid_lr: float = 3e-2
    feature_lr: float = 1e-2
    selection_episodes: int = 16
    observer: str = "mse"

    def __post_init__(self) -> None:
        for name in ("rounds", "steps", "batch", "rollout_steps", "window", "selection_episodes"):
            if getattr(self, name) < 1:
                raise InputError(f"distillation needs at least 1 for {name}, not {getattr(self, name)}")
        if not 0 <= self.teacher_share <= 1:
            raise InputError(f"teacher_share is a share of the batch, 0 to 1, not {self.teacher_share}")
        if min(self.lr, self.grid_lr, self.feature_lr) < 0 or self.lr == 0:
            raise InputError("learning rates are positive (grid_lr and feature_lr may be 0)")


TRAINED = {"qat": Distillation(rounds=1, steps=4000), "distill": Distillation()}
"""The settings behind the method names ``qat`` (the teacher's episodes alone) and ``distill``."""


@dataclass(frozen=True)
class DistillationRound:
    """What a round came to.

    Attributes:
        number: from 0.
        loss: mean over its steps, in the unit of :mod:`~rlquant.control.imitation`.
        score: mean return of the student's selection episodes; None in the first half of the rounds.
    """

    number: int
    loss: float
    score: float | None


def distill(
    agent: Agent,
    scheme: str | Scheme | MixedScheme,
    *,
    settings: Distillation | None = None,
    seed: int = 0,
    pool: EnvPool | None = None,
    progress: Callable[[DistillationRound], None] | None = None,
) -> Agent:
    """A quantized agent that was taught by ``agent`` to act as it does.

    Deterministic under the seed, on one torch thread. An MLP of 256-256 units takes one to three minutes.

    Args:
        agent: an fp32 agent; it stays as it is.
        scheme: integer weights of 2 to 16 bits; activations static, dynamic or float.
        settings: by default ``TRAINED["distill"]``.
        seed: of everything.
        pool: environments to reuse.
        progress: called after each round.

    Returns:
        The best student, an ordinary quantized agent with method ``distill``, or ``qat`` where it learned from
        the teacher's episodes alone.

    Raises:
        InputError: the agent is quantized already, the scheme has no integer grid, or a setting is out of
            range.
    """
    if agent.precision != "fp32":
        raise InputError(f"{agent.source} is quantized to {agent.precision} already; distil the fp32 agent")
    settings = settings or TRAINED["distill"]
    if not 0 <= seed < CALIBRATION_SEED - _MAX_EPISODES * settings.rounds:
        raise InputError(f"the seed must be between 0 and about {CALIBRATION_SEED:,}, not {seed}")
    own = pool or EnvPool(agent.env)
    try:
        with single_thread():
            return _Classroom(agent, MixedScheme.of(scheme), settings, seed, own).teach(progress)
    finally:
        if pool is None:
            own.close()


class _Classroom:
    """Teacher, student, the data and the optimiser of one distillation."""

    def __init__(
        self, teacher: Agent, scheme: MixedScheme, settings: Distillation, seed: int, pool: EnvPool
    ) -> None:
        self.teacher, self.settings, self.seed, self.pool = teacher, settings, seed, pool
        self.generator = torch.Generator().manual_seed(seed)
        seed += CALIBRATION_SEED
        calibration = rollout(teacher, range(_CALIBRATION_EPISODES), seed=seed, pool=pool)
        self.episodes = _episodes(settings.rollout_steps, float(calibration.lengths.mean()))
        self.student = Student(
            teacher,
            scheme,
            collect(teacher, _CALIBRATION_EPISODES, seed=seed, pool=pool),
            observer=settings.observer,
        )
        self.lessons: list[Lesson] = []
        self._record(teacher, range(2 * self.episodes), seed, 2 * settings.rollout_steps)
        labels = self.lessons[0].labels[self.lessons[0].valid]
        self.loss = imitation_loss(teacher.head, labels)
        groups = self.student.parameter_groups(settings.lr, settings.grid_lr, settings.feature_lr)
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings.rounds * settings.steps
        )

    def teach(self, progress: Callable[[DistillationRound], None] | None) -> Agent:
        settings = self.settings
        method = "distill" if settings.rounds > 1 else "qat"
        best, best_score = self.student.acting(method), -math.inf
        for number in range(settings.rounds):
            loss = self._train()
            acting, score = self.student.acting(method), None
            if number >= settings.rounds // 2:
                score = self._select(acting)
                if score >= best_score:
                    best, best_score = acting, score
            if number + 1 < settings.rounds:
                first = number * self.episodes
                episodes = range(first, first + self.episodes)
                self._record(acting, episodes, self.seed + DAGGER_SEED, settings.rollout_steps)
            if progress is not None:
                progress(DistillationRound(number, loss, score))
        return best

    def _record(self, acting: Agent, episodes: range, seed: int, steps: int) -> None:
        lesson = record(self.teacher, acting, episodes, seed=seed, pool=self.pool, steps=steps)
        kept = self.lessons[1:][-self.settings.window + 1 :] if self.settings.window > 1 else []
        self.lessons = [*self.lessons[:1], *kept, lesson]

    def _train(self) -> float:
        own = Lesson.joined(self.lessons[1:]) if len(self.lessons) > 1 else None
        total = 0.0
        for _ in range(self.settings.steps):
            batch = self._draw(own)
            outputs = unroll(self.student.actor, batch.parts, batch.state)
            loss = self.loss(outputs[batch.valid], batch.labels[batch.valid])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            total += float(loss.detach())
        return total / self.settings.steps

    def _draw(self, own: Lesson | None) -> Lesson:
        """A batch: a share of the teacher's episodes, the rest of the student's, drawn with replacement."""
        size = self.settings.batch if self.teacher.actor.rnn is None else _RECURRENT_BATCH
        if own is None:
            return self.lessons[0].rows(self._indices(len(self.lessons[0]), size))
        teachers = round(size * self.settings.teacher_share)
        return Lesson.joined(
            [
                self.lessons[0].rows(self._indices(len(self.lessons[0]), teachers)),
                own.rows(self._indices(len(own), size - teachers)),
            ]
        )

    def _indices(self, count: int, size: int) -> Tensor:
        return torch.randint(count, (size,), generator=self.generator)

    def _select(self, acting: Agent) -> float:
        seed = self.seed + SELECTION_SEED
        played = rollout(acting, range(self.settings.selection_episodes), seed=seed, pool=self.pool)
        return float(played.returns.mean())


def _episodes(steps: int, length: float) -> int:
    """How many episodes of a mean length make about so many steps."""
    return min(_MAX_EPISODES, max(1, math.ceil(steps / length)))
