"""The observation normaliser that an agent was trained with, frozen.

The arithmetic is that of SB3's ``VecNormalize``: ``clip((obs - mean) / sqrt(var + epsilon), -c, c)`` in
float64, so that an agent sees the same numbers here as in its training. An agent never travels without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlquant.control.inert_pickle import Record, read_pickle
from rlquant.errors import InputError

__all__ = ["Normaliser", "load_normaliser"]


@dataclass(frozen=True)
class Normaliser:
    """Frozen statistics of one observation part.

    Attributes:
        mean, var: float64 arrays of the shape of one raw observation.
        epsilon: added to the variance.
        clip: bound of the normalised observation.
    """

    mean: np.ndarray
    var: np.ndarray
    epsilon: float = 1e-8
    clip: float = 10.0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean).all() and np.isfinite(self.var).all() and (self.var >= 0).all()):
            raise InputError("the observation normaliser holds NaN, Inf or negative variances")
        object.__setattr__(self, "_std", np.sqrt(self.var + self.epsilon))

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Normalise ``[n, *shape]`` to float32 of the same shape."""
        scaled = (observations - self.mean) / self._std  # type: ignore[attr-defined]
        clipped: np.ndarray = np.clip(scaled, -self.clip, self.clip).astype(np.float32)
        return clipped

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a Python float prints as the shortest text that reads back exactly."""
        return {
            "mean": self.mean.ravel().tolist(),
            "var": self.var.ravel().tolist(),
            "shape": list(self.mean.shape),
            "epsilon": self.epsilon,
            "clip": self.clip,
        }

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> Normaliser:
        """The inverse of :meth:`to_json`."""
        mean, var = (np.asarray(doc[key], np.float64).reshape(doc["shape"]) for key in ("mean", "var"))
        return cls(mean, var, float(doc["epsilon"]), float(doc["clip"]))


def load_normaliser(path: Path, *, trust: bool = False) -> dict[str, Normaliser]:
    """Normalisers of a ``vecnormalize.pkl`` by observation key (``""`` for a space that is no Dict).

    Empty where the statistics cover the reward only (``norm_obs=False``).

    Args:
        path: the pickle that ``VecNormalize.save`` wrote.
        trust: unpickle it with Python's own unpickler, which runs whatever code it names.

    Raises:
        InputError: it is missing, refused by the allow-list, or holds no observation statistics.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"the normaliser {path} cannot be read: {error.strerror}") from None
    state = _trusted_state(data) if trust else _inert_state(data, path)
    if not state.get("norm_obs", True):
        return {}
    rms = state.get("obs_rms")
    epsilon, clip = float(state.get("epsilon", 1e-8)), float(state.get("clip_obs", 10.0))
    if isinstance(rms, dict):
        keys = state.get("norm_obs_keys") or list(rms)
        return {key: _from_rms(rms[key], epsilon, clip, path) for key in keys if key in rms}
    return {"": _from_rms(rms, epsilon, clip, path)}


def _inert_state(data: bytes, path: Path) -> dict[str, Any]:
    record = read_pickle(data, str(path))
    if not isinstance(record, Record) or "obs_rms" not in record.state:
        raise InputError(f"{path} holds no VecNormalize statistics")
    return record.state


def _trusted_state(data: bytes) -> dict[str, Any]:
    import pickle

    state: dict[str, Any] = vars(pickle.loads(data))
    return state


def _from_rms(rms: Any, epsilon: float, clip: float, path: Path) -> Normaliser:
    state = rms.state if isinstance(rms, Record) else getattr(rms, "__dict__", {})
    if "mean" not in state or "var" not in state:
        raise InputError(f"{path} holds no mean and variance of the observations")
    mean, var = (np.asarray(state[key], np.float64) for key in ("mean", "var"))
    return Normaliser(mean, var, epsilon, clip)
