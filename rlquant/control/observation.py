"""From what the environment shows to what the network sees, as SB3 does it in training.

In order: normalise (frozen), stack frames (oldest first, zeros before the episode began), transpose images to
channels first, then one-hot or float, images divided by 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlquant.control.normaliser import Normaliser
from rlquant.control.spaces import Space, flat_size

__all__ = ["FrameStack", "ObservationPart", "fit_parts", "parts_of"]


@dataclass(frozen=True)
class ObservationPart:
    """How one part of an observation (the whole, or one key of a Dict) becomes network input.

    Attributes:
        space: as the environment shows it.
        normaliser: applied first, or None.
        stack: how many observations are stacked.
        transpose: the image is channels last and the network wants channels first.
        scale: what the numbers are divided by (255 for images).
    """

    space: Space
    normaliser: Normaliser | None = None
    stack: int = 1
    transpose: bool = False
    scale: float = 1.0

    @property
    def stack_axis(self) -> int:
        """The axis of ``[n, *shape]`` along which frames are stacked: channels, else the last."""
        channels_first = self.space.is_image and not self.transpose
        return 1 if channels_first else -1

    @property
    def network_shape(self) -> tuple[int, ...]:
        """Shape of one network input."""
        if self.space.kind != "box":
            return (flat_size(self.space),)
        shape = list(self.space.shape)
        if self.stack > 1:
            shape[0 if self.stack_axis == 1 else -1] *= self.stack
        return (shape[2], shape[0], shape[1]) if self.transpose else tuple(shape)

    def to_network(self, stacked: np.ndarray) -> np.ndarray:
        """Network input float32 ``[n, *network_shape]`` for observations ``[n, ...]``, stacked already."""
        if self.space.kind in ("discrete", "multidiscrete"):
            return _one_hot(stacked, self.space.sizes)
        if self.transpose:
            stacked = stacked.transpose(0, 3, 1, 2)
        numbers = stacked.astype(np.float32)
        if self.scale != 1.0:
            numbers /= np.float32(self.scale)
        return numbers.reshape(len(numbers), *self.network_shape)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as an artifact stores it."""
        return {
            "space": self.space.to_json(),
            "normaliser": None if self.normaliser is None else self.normaliser.to_json(),
            "stack": self.stack,
            "transpose": self.transpose,
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> ObservationPart:
        """The inverse of :meth:`to_json`."""
        normaliser = None if doc["normaliser"] is None else Normaliser.from_json(doc["normaliser"])
        space = Space.from_json(doc["space"])
        return cls(space, normaliser, doc["stack"], doc["transpose"], float(doc["scale"]))


class FrameStack:
    """The last observations of each of ``rows`` episodes (SB3's ``StackedObservations``)."""

    def __init__(self, part: ObservationPart, rows: int) -> None:
        self.part = part
        shape = [rows, *part.space.shape]
        self._width = shape[part.stack_axis]
        shape[part.stack_axis] *= part.stack
        dtype = np.float32 if part.normaliser is not None else np.dtype(part.space.dtype)
        self._frames = np.zeros(shape, dtype)

    def push(
        self, observations: np.ndarray, starts: np.ndarray, live: np.ndarray | None = None
    ) -> np.ndarray:
        """Add ``[rows, *shape]``; where ``starts`` (bool ``[rows]``), forget what was before. The stack.

        Rows that are not ``live`` (bool ``[rows]``; None for all) stay as they are.
        """
        axis = self.part.stack_axis
        frames = np.roll(self._frames, -self._width, axis=axis)
        frames[starts] = 0
        newest = [slice(None)] * frames.ndim
        newest[axis] = slice(-self._width, None)
        frames[tuple(newest)] = observations
        if live is not None:
            frames[~live] = self._frames[~live]
        self._frames = frames
        return self._frames


def parts_of(space: Space) -> dict[str, Space]:
    """A Dict's parts by key; any other space as one part named ``""``."""
    return space.spaces if space.kind == "dict" else {"": space}


def fit_parts(
    raw: Space, network: Space, *, stack: int = 1, scale_images: bool = True
) -> dict[str, ObservationPart] | None:
    """How observations of ``raw`` become inputs of ``network``; None where they do not fit.

    Args:
        raw: the environment's observation space.
        network: the space that the network was built for.
        stack: how many observations are stacked.
        scale_images: whether images are divided by 255.
    """
    raw_parts, network_parts = parts_of(raw), parts_of(network)
    if set(raw_parts) != set(network_parts):
        return None
    parts = {key: _fit_part(raw_parts[key], network_parts[key], stack, scale_images) for key in network_parts}
    return None if None in parts.values() else parts  # type: ignore[return-value]


def _fit_part(raw: Space, network: Space, stack: int, scale_images: bool) -> ObservationPart | None:
    if raw.kind != network.kind or raw.sizes != network.sizes:
        return None
    scale = 255.0 if raw.is_image and scale_images else 1.0
    for transpose in (False, True) if raw.is_image else (False,):
        part = ObservationPart(raw, stack=stack, transpose=transpose, scale=scale)
        if raw.kind != "box" or part.network_shape == network.shape:
            return part
    return None


def _one_hot(choices: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """``[n]`` or ``[n, branches]`` choices as concatenated one-hot rows ``[n, sum(sizes)]``."""
    columns = choices.reshape(len(choices), len(sizes)).astype(np.int64)
    encoded = np.zeros((len(choices), sum(sizes)), np.float32)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    np.put_along_axis(encoded, columns + offsets, 1.0, axis=1)
    return encoded
