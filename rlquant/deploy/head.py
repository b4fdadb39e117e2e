"""The last step of a program: from the network's outputs to the action.

tanh is a fixed sequence of float32 operations, each rounded once, so that it too is equal to the bit in every
runtime; it differs from the correctly rounded tanh by a few units in the last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HEAD_KINDS",
    "TANH_DENOMINATOR",
    "TANH_LIMIT",
    "TANH_NUMERATOR",
    "ProgramHead",
    "sigmoid32",
    "tanh32",
]

HEAD_KINDS = ("argmax", "multi_argmax", "threshold", "clip", "tanh", "unscale")

# The rational minimax approximation of Eigen (MPL2, Eigen/src/Core/MathFunctionsImpl.h, ptanh_float), odd over even.
TANH_LIMIT = np.float32(7.90531110763549805)
TANH_NUMERATOR = tuple(
    map(
        np.float32,
        (
            -2.76076847742355e-16,
            2.00018790482477e-13,
            -8.60467152213735e-11,
            5.12229709037114e-08,
            1.48572235717979e-05,
            6.37261928875436e-04,
            4.89352455891786e-03,
        ),
    )
)
TANH_DENOMINATOR = tuple(
    map(np.float32, (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03))
)


def tanh32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """tanh of float32, by separate float32 multiplications and additions (Horner) and one division."""
    x = np.clip(x, -TANH_LIMIT, TANH_LIMIT)
    square = x * x
    numerator = np.full_like(x, TANH_NUMERATOR[0])
    for coefficient in TANH_NUMERATOR[1:]:
        numerator = numerator * square + coefficient
    denominator = np.full_like(x, TANH_DENOMINATOR[0])
    for coefficient in TANH_DENOMINATOR[1:]:
        denominator = denominator * square + coefficient
    return numerator * x / denominator


def sigmoid32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logistic function of float32, by :func:`tanh32`."""
    half = np.float32(0.5)
    return half * tanh32(half * x) + half


@dataclass(frozen=True, eq=False)
class ProgramHead:
    """From outputs ``[n, outputs]`` to actions.

    Attributes:
        kind: as :class:`rlquant.control.Head`.
        outputs: how many numbers the network puts out.
        branches: choices of each branch (argmax kinds).
        low, high: float32 ``[outputs]``: action bounds (clip, tanh, unscale).
        shape: of one action.
    """

    kind: str
    outputs: int
    branches: tuple[int, ...] = ()
    low: NDArray[np.float32] | None = None
    high: NDArray[np.float32] | None = None
    shape: tuple[int, ...] = ()

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Of one action: ``()`` for argmax, ``[branches]`` for several, else :attr:`shape`."""
        if self.kind == "argmax":
            return ()
        return (len(self.branches),) if self.kind == "multi_argmax" else self.shape

    @property
    def size(self) -> int:
        """How many numbers an action has."""
        return int(np.prod(self.action_shape, dtype=np.int64))

    def __call__(self, outputs: NDArray[np.float32], masks: NDArray[np.bool_] | None = None) -> NDArray[Any]:
        """int64 ``[n]`` or ``[n, branches]``, int8 ``[n, *shape]`` (threshold) or float32 ``[n, *shape]``."""
        if masks is not None:
            outputs = np.where(masks.reshape(outputs.shape), outputs, np.float32(-np.inf))
        if self.kind == "argmax":
            return np.asarray(outputs.argmax(axis=1))
        if self.kind == "multi_argmax":
            parts = np.split(outputs, np.cumsum(self.branches)[:-1], axis=1)
            return np.stack([part.argmax(axis=1) for part in parts], axis=1)
        if self.kind == "threshold":
            return (outputs > 0).astype(np.int8).reshape(-1, *self.shape)
        assert self.low is not None
        assert self.high is not None
        if self.kind == "clip":
            actions = np.clip(outputs, self.low, self.high)
        else:
            squashed = tanh32(outputs) if self.kind == "tanh" else outputs
            half = np.float32(0.5) * (squashed + np.float32(1.0))
            actions = self.low + half * (self.high - self.low)
        return actions.astype(np.float32, copy=False).reshape(-1, *self.shape)
