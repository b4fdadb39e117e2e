"""Whether a source is a control policy or a language model: read off the files, never guessed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from rlquant import catalog

__all__ = ["Kind", "is_hub_id", "source_kind"]

Kind = Literal["control", "language"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def source_kind(source: str) -> Kind:
    """What a source is.

    A folder whose config.json names a ``model_type``, an artifact of a language model, a ``.gguf`` file or a folder
    with one, and what is no path but looks like a Hub id are language models; everything else is for control, whose
    loader says what is wrong with it.
    """
    path = Path(source).expanduser()
    if source in catalog.agents():
        return "control"
    if path.is_dir():
        return "language" if _is_model_folder(path) else "control"
    if path.exists() or path.suffix == ".zip":
        return "language" if path.suffix == ".gguf" else "control"
    return "language" if is_hub_id(source) and not path.parent.is_dir() else "control"


def is_hub_id(source: str) -> bool:
    """Whether a text is of the form ``owner/name`` or ``owner/name@revision``."""
    return _HUB_ID.fullmatch(source) is not None


def _is_model_folder(path: Path) -> bool:
    if (path / "rlquant.json").exists() or any(path.glob("*.gguf")):
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config
