"""From the numbers that a policy network puts out to the action that the environment takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rlquant.control.spaces import Space
from rlquant.errors import InputError

__all__ = ["HEADS", "Head"]

HEADS = ("argmax", "multi_argmax", "threshold", "clip", "tanh", "unscale")


@dataclass(frozen=True)
class Head:
    """The deterministic action of a policy, as stock SB3 computes it.

    Attributes:
        kind: ``argmax`` of logits or Q-values; ``multi_argmax`` per branch; ``threshold`` (logit > 0);
            ``clip`` of a Gaussian mean to the action bounds; ``tanh`` then unscale to the bounds;
            ``unscale`` of an output that is squashed already.
        space: the action space.
    """

    kind: str
    space: Space

    def __post_init__(self) -> None:
        if self.kind not in HEADS:
            raise InputError(f"unknown head {self.kind!r}; choices: {', '.join(HEADS)}")
        expected = {"argmax": "discrete", "multi_argmax": "multidiscrete", "threshold": "multibinary"}
        if self.space.kind != expected.get(self.kind, "box"):
            raise InputError(f"a {self.kind} head cannot act in {self.space.describe()}")
        if self.space.kind == "box":
            low, high = self.space.bounds()
            object.__setattr__(self, "_bounds", (low.ravel(), high.ravel()))

    @property
    def discrete(self) -> bool:
        """Whether actions are choices rather than numbers."""
        return self.space.kind != "box"

    @property
    def outputs(self) -> int:
        """How many numbers the network puts out."""
        return sum(self.space.sizes) if self.space.sizes else int(np.prod(self.space.shape, dtype=np.int64))

    def __call__(self, outputs: np.ndarray, masks: np.ndarray | None = None) -> np.ndarray:
        """Actions for head outputs.

        Args:
            outputs: float32 ``[n, outputs]``.
            masks: bool ``[n, outputs]``; False forbids a choice (discrete heads only).

        Returns:
            int64 ``[n]`` or ``[n, branches]`` for choices, float32 ``[n, *shape]`` for numbers.
        """
        if masks is not None:
            outputs = np.where(masks.reshape(outputs.shape), outputs, -np.inf)
        if self.kind == "argmax":
            return np.asarray(outputs.argmax(axis=1))
        if self.kind == "multi_argmax":
            branches = np.split(outputs, np.cumsum(self.space.sizes)[:-1], axis=1)
            return np.stack([branch.argmax(axis=1) for branch in branches], axis=1)
        if self.kind == "threshold":
            return (outputs > 0).astype(np.int8).reshape(-1, *self.space.shape)
        low, high = self._bounds  # type: ignore[attr-defined]
        actions: np.ndarray
        if self.kind == "clip":
            actions = np.clip(outputs, low, high)
        else:
            squashed = np.tanh(outputs) if self.kind == "tanh" else outputs
            actions = low + (0.5 * (squashed + 1.0) * (high - low))
        return actions.astype(np.float32, copy=False).reshape(-1, *self.space.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as an artifact stores it."""
        return {"kind": self.kind, "space": self.space.to_json()}

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Head:
        """The inverse of :meth:`to_json`."""
        return cls(doc["kind"], Space.from_json(doc["space"]))
