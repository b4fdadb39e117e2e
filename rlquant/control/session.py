"""Acting for many episodes at once, with the same arithmetic for each whatever the batch.

A matrix product may round differently at another batch size, because the library picks another kernel. So
the network always sees tiles of exactly :data:`TILE` rows, in aligned memory, and an episode sits in the same
row of its tile whoever runs beside it. Returns are then bit-identical for every batch size and worker count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlquant.control.agent import Agent
from rlquant.control.observation import FrameStack
from rlquant.errors import InputError

__all__ = ["TILE", "Observations", "Session", "batch_of_one"]

TILE = 32
"""Rows of one forward pass. Fewer would pay more calls, more would pay for rows whose episode has ended."""

Observations = Any
"""``[rows, *shape]``, or a dict of such arrays by key for a Dict space."""

Recorder = Callable[[dict[str, Tensor], Any, np.ndarray], None]


class Session:
    """One agent acting in ``rows`` episodes, with its memory (stacked frames, recurrent state) for each.

    Args:
        agent: the policy.
        rows: how many episodes; the last tile may be partly filled.
        tile: rows of one forward pass.
        device: where the network runs.
        recorder: called with (inputs by key, recurrent state, row indices) for the live rows of each step.
    """

    def __init__(
        self,
        agent: Agent,
        rows: int,
        *,
        tile: int = TILE,
        device: str = "cpu",
        recorder: Recorder | None = None,
    ) -> None:
        self.agent = agent
        self.rows = rows
        self.tile = tile
        self.device = torch.device(device)
        self.recorder = recorder
        self.actor = agent.actor.to(self.device).eval()
        padded = -(-rows // tile) * tile
        self.outputs = np.zeros((padded, agent.head.outputs), np.float32)
        self._inputs = {key: torch.zeros(padded, *part.network_shape) for key, part in agent.parts.items()}
        self._frames = {key: FrameStack(part, rows) for key, part in agent.parts.items() if part.stack > 1}
        state = agent.actor.initial_state(tile)
        self._states = [_moved(state, self.device) for _ in range(padded // tile)]

    def act(
        self,
        observations: Observations,
        starts: np.ndarray,
        live: np.ndarray | None = None,
        masks: np.ndarray | None = None,
    ) -> np.ndarray:
        """Deterministic actions for one step of all episodes.

        Args:
            observations: ``[rows, *shape]``, as the environments show them (a dict of them by key).
            starts: bool ``[rows]``: the episode begins with this observation; its memory is cleared.
            live: bool ``[rows]``: rows that act; None for all. The memory of the others stays as it is, and tiles
                without any are skipped.
            masks: bool ``[rows, choices]``; False forbids a choice.

        Returns:
            Actions ``[rows, ...]``; :attr:`outputs` holds the head outputs ``[rows, outputs]``.

        Raises:
            InputError: an observation is NaN.
        """
        self._prepare(observations, starts, live)
        for index, first in enumerate(range(0, len(self.outputs), self.tile)):
            rows = slice(first, min(first + self.tile, self.rows))
            if live is None or live[rows].any():
                self._forward(index, rows, starts, live)
        return self.agent.head(self.outputs[: self.rows], masks)

    def _prepare(self, observations: Observations, starts: np.ndarray, live: np.ndarray | None) -> None:
        for key, part in self.agent.parts.items():
            raw = observations[key] if isinstance(observations, dict) else observations
            if raw.dtype.kind == "f" and np.isnan(raw).any():
                raise InputError(f"an observation of {self.agent.env.id} holds NaN; no action was taken")
            normal = raw if part.normaliser is None else part.normaliser(raw)
            if key in self._frames:
                normal = self._frames[key].push(normal, starts, live)
            self._inputs[key][: self.rows] = torch.from_numpy(part.to_network(normal))

    def _forward(self, index: int, rows: slice, starts: np.ndarray, live: np.ndarray | None) -> None:
        tile = slice(rows.start, rows.start + self.tile)
        inputs = {key: x[tile].to(self.device) for key, x in self._inputs.items()}
        state = self._states[index]
        if state is not None and starts[rows].any():
            state = _cleared(state, np.flatnonzero(starts[rows]))
        if self.recorder is not None:
            alive = np.ones(rows.stop - rows.start, bool) if live is None else live[rows]
            keep = np.flatnonzero(alive)
            self.recorder({key: x[keep] for key, x in inputs.items()}, _rows(state, keep), keep + rows.start)
        with torch.no_grad():
            outputs, after = self.actor(inputs, state)
        self._states[index] = after if live is None else _restored(after, state, np.flatnonzero(~live[rows]))
        self.outputs[tile] = outputs.cpu().numpy()


def batch_of_one(observation: Any) -> Any:
    """One observation as a batch ``[1, ...]``, by key for a Dict space."""
    if isinstance(observation, dict):
        return {key: np.asarray(part)[None] for key, part in observation.items()}
    return np.asarray(observation)[None]


def _moved(state: Any, device: torch.device) -> Any:
    return _each(state, lambda tensor: tensor.to(device))


def _cleared(state: Any, rows: np.ndarray) -> Any:
    """The recurrent state with zeros in ``rows``; the old one is left as it was."""

    def clear(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, rows] = 0
        return tensor

    return _each(state, clear)


def _restored(state: Any, before: Any, rows: np.ndarray) -> Any:
    """The recurrent state with that of ``before`` in ``rows``."""
    if state is None or rows.size == 0:
        return state
    if isinstance(state, tuple):
        return tuple(_restored(part, old, rows) for part, old in zip(state, before, strict=True))
    state = state.clone()
    state[:, rows] = before[:, rows]
    return state


def _rows(state: Any, rows: np.ndarray) -> Any:
    return _each(state, lambda tensor: tensor[:, rows].clone())


def _each(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply to each tensor of a state: None (no memory), a tensor (GRU) or a pair (LSTM)."""
    if state is None:
        return None
    return tuple(function(part) for part in state) if isinstance(state, tuple) else function(state)
