"""What a student is trained on: inputs of a network along episodes, labelled by the teacher.

A network without memory learns from single steps. A recurrent one learns from stretches of ``CHUNK`` steps,
each entered with the state that the teacher has there; the teacher runs beside whoever acts, with its own
state, so that its labels are what it would have done after seeing the same episode.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlquant.control.actor import Actor
from rlquant.control.agent import Agent
from rlquant.control.collect import collect, joined_states
from rlquant.control.rollout import EnvPool, rollout

__all__ = ["CHUNK", "Lesson", "record", "unroll"]

CHUNK = 32
"""Steps through which a recurrent student's gradient flows."""

_MEMORY = 2**28  # bytes of inputs in one lesson, which bounds the rows of images


@dataclass(frozen=True)
class Lesson:
    """Labelled inputs: ``n`` stretches of ``length`` steps, one step for a network without memory.

    Attributes:
        parts: float32 ``[n, length, *shape]`` by observation key.
        labels: the teacher's outputs, float32 ``[n, length, outputs]``.
        valid: bool ``[n, length]``; False after an episode's end.
        state: the teacher's recurrent state that enters each stretch, ``[layers, n, hidden]`` each, or None.
    """

    parts: dict[str, Tensor]
    labels: Tensor
    valid: Tensor
    state: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def steps(self) -> int:
        """How many labelled steps there are."""
        return int(self.valid.sum())

    def rows(self, index: Tensor) -> Lesson:
        """Some of the stretches, in this order."""
        parts = {key: x[index] for key, x in self.parts.items()}
        state = None if self.state is None else _map(self.state, lambda x: x[:, index])
        return Lesson(parts, self.labels[index], self.valid[index], state)

    @staticmethod
    def joined(lessons: list[Lesson]) -> Lesson:
        """The stretches of several lessons."""
        parts = {key: torch.cat([lesson.parts[key] for lesson in lessons]) for key in lessons[0].parts}
        labels, valid = (
            torch.cat([getattr(lesson, name) for lesson in lessons]) for name in ("labels", "valid")
        )
        state = joined_states([lesson.state for lesson in lessons])
        return Lesson(parts, labels, valid, state)


def unroll(actor: nn.Module, parts: dict[str, Tensor], state: Any) -> Tensor:
    """Outputs ``[n, length, outputs]`` of an :class:`Actor` along stretches ``[n, length, *shape]``."""
    assert isinstance(actor, Actor)
    n, length = next(iter(parts.values())).shape[:2]
    x = torch.cat([actor.encoder(key)(parts[key].flatten(0, 1)) for key in actor.keys], dim=1)
    if actor.rnn is not None:
        out, _ = actor.rnn(x.view(n, length, -1).transpose(0, 1).contiguous(), state)  # [length, n, hidden]
        x = out.transpose(0, 1).flatten(0, 1)
    outputs: Tensor = actor.trunk(x)
    return outputs.view(n, length, -1)


def record(teacher: Agent, acting: Agent, episodes: range, *, seed: int, pool: EnvPool, steps: int) -> Lesson:
    """Roll out ``acting`` and label what it meets.

    Args:
        teacher: the frozen fp32 agent.
        acting: the teacher itself or a student.
        episodes: numbers of the episodes; number ``i`` starts with ``env.reset(seed=seed + i)``.
        seed: of episode 0.
        pool: environments.
        steps: to keep at most, evenly thinned.
    """
    width = 4 * sum(int(np.prod(part.network_shape)) for part in teacher.parts.values())
    limit = max(256, min(steps, _MEMORY // width))
    if teacher.actor.rnn is not None:
        return _record_stretches(teacher, acting, episodes, seed, pool, limit)
    inputs = collect(acting, len(episodes), seed=seed + episodes.start, limit=limit, pool=pool)
    labels = torch.from_numpy(inputs.outputs(teacher.actor))
    parts = {key: x.unsqueeze(1) for key, x in inputs.parts.items()}
    return Lesson(parts, labels.unsqueeze(1), torch.ones(len(labels), 1, dtype=torch.bool))


@dataclass
class _Episodes:
    """A recorder that keeps each episode's inputs apart; every row of a rollout is one episode."""

    steps: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)

    def __call__(self, parts: dict[str, Tensor], state: Any, rows: np.ndarray) -> None:
        for position, row in enumerate(rows.tolist()):
            self.steps.setdefault(row, []).append(
                {key: x[position].cpu().clone() for key, x in parts.items()}
            )


def _record_stretches(
    teacher: Agent, acting: Agent, episodes: range, seed: int, pool: EnvPool, limit: int
) -> Lesson:
    recorder = _Episodes()
    rollout(acting, episodes, seed=seed, pool=pool, batch=len(episodes), recorder=recorder)
    lessons = []
    for steps in recorder.steps.values():
        episode = {key: torch.stack([step[key] for step in steps]) for key in teacher.parts}  # [T, *shape]
        lessons.append(_label_episode(teacher.actor, episode))
    whole = Lesson.joined(lessons)
    if whole.steps > limit:
        stride = -(-whole.steps // limit)
        whole = whole.rows(torch.arange(0, len(whole), stride))
    return whole


@torch.no_grad()
def _label_episode(actor: Actor, episode: dict[str, Tensor]) -> Lesson:
    """Cut an episode into stretches; the last one is padded with zeros, which ``valid`` leaves out."""
    length = len(next(iter(episode.values())))
    count = -(-length // CHUNK)
    parts = {}
    for key, x in episode.items():
        padded = x.new_zeros(count * CHUNK, *x.shape[1:])
        padded[:length] = x
        parts[key] = padded.view(count, CHUNK, *x.shape[1:])
    state, states, labels = actor.initial_state(1), [], []
    for index in range(count):
        states.append(state)
        x = torch.cat(
            [actor.encoder(key)(parts[key][index]) for key in actor.keys], dim=1
        )  # [CHUNK, features]
        out, state = actor.rnn(x.unsqueeze(1), state)  # [CHUNK, 1, hidden]
        labels.append(actor.trunk(out.squeeze(1)))
    valid = torch.arange(count * CHUNK).view(count, CHUNK) < length
    return Lesson(parts, torch.stack(labels), valid, joined_states(states))


def _map(state: Any, function: Any) -> Any:
    return tuple(function(part) for part in state) if isinstance(state, tuple) else function(state)
