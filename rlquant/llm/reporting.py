"""Metrics of a run to TensorBoard or Weights & Biases, where a trainer does not send them itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

from rlquant.errors import InputError

__all__ = ["Report", "check_report", "tracker"]

Report = Literal["none", "tensorboard", "wandb"]


def check_report(name: Report) -> None:
    """Raises InputError where what reports is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise InputError(f"report = {name!r} needs the package {name}: pip install {name}")


def tracker(name: Report, folder: Path) -> Any:
    """What metrics are logged to, by ``log(metrics, step=...)`` and ``finish()``; None where there is no report.

    Args:
        name: of the report.
        folder: where the files go.

    Raises:
        InputError: it is not installed.
    """
    if name == "none":
        return None
    check_report(name)
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if name == "tensorboard":
        found = TensorBoardTracker("runs", logging_dir=folder)
    else:
        found = WandBTracker("rlquant", dir=str(folder))
    if hasattr(found, "start"):  # accelerate 1.11; before that it begins by itself
        found.start()
    return found
