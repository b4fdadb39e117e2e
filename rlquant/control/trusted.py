"""Loads an SB3 zip through SB3 itself. This runs code from the file: only for authors whom the user trusts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlquant.control.sb3_zip import ALGORITHMS, Checkpoint, read_checkpoint
from rlquant.errors import InputError

__all__ = ["read_trusted", "sb3_class"]


def sb3_class(algorithm: str) -> Any:
    """The class of an algorithm, from stable_baselines3 or sb3_contrib."""
    import sb3_contrib
    import stable_baselines3

    return getattr(stable_baselines3, algorithm, None) or getattr(sb3_contrib, algorithm)


def read_trusted(path: Path) -> Checkpoint:
    """Read a checkpoint, unpickling what the safe reader refuses.

    Raises:
        InputError: no algorithm of SB3 or sb3-contrib can load the file.
    """
    import torch

    try:
        return read_checkpoint(path)
    except InputError as refused:
        reasons = [str(refused)]
    for algorithm in ALGORITHMS:
        try:
            model = sb3_class(algorithm).load(path, device=torch.device("cpu"))
        except Exception as error:  # foreign code may raise anything; the next algorithm may fit
            reasons.append(f"{algorithm}: {error}")
            continue
        raise InputError(f"{path} loads as {algorithm} but {reasons[0]}; {model.policy}")
    raise InputError(f"{path} cannot be loaded by any SB3 algorithm, even trusted: {'; '.join(reasons[:3])}")
