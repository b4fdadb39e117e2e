"""Where the finished pieces of a run are kept."""

from __future__ import annotations

import json
from typing import Any, Protocol

__all__ = ["Memory", "Pieces"]


class Pieces(Protocol):
    """Keeps pieces of plain JSON by name; :class:`rlquant.runs.RunFolder` keeps them on disk."""

    def piece(self, name: str) -> dict[str, Any] | None:
        """A piece kept earlier, or None."""

    def save_piece(self, name: str, content: dict[str, Any]) -> None:
        """Keep a piece."""


class Memory:
    """Pieces for as long as the object lives, through JSON like those on disk."""

    def __init__(self) -> None:
        self._kept: dict[str, str] = {}

    def piece(self, name: str) -> dict[str, Any] | None:
        """See :class:`Pieces`."""
        content: dict[str, Any] | None = json.loads(self._kept.get(name, "null"))
        return content

    def save_piece(self, name: str, content: dict[str, Any]) -> None:
        """See :class:`Pieces`."""
        self._kept[name] = json.dumps(content)
