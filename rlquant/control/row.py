"""One row of an evaluation while it is played."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlquant.control.agent import Agent
from rlquant.control.pieces import Pieces
from rlquant.control.realtime import Coupling
from rlquant.quant import MixedScheme

__all__ = ["Row"]


@dataclass
class Row:
    """One precision while it is evaluated; ``profile`` is what is measured besides the scores.

    ``realtime`` holds the same precision in worlds that do not wait, a row for each ``coupling``.
    """

    scheme: MixedScheme
    method: str
    agent: Agent
    artifact: bool = False
    runtime: str = ""
    returns: list[float] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    coupling: Coupling | None = None
    realtime: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What its pieces are called."""
        slowdown = f"-x{self.coupling.slowdown:.12g}" if self.coupling else ""
        return f"{self.scheme.name}-{self.method}" + ("-artifact" if self.artifact else "") + slowdown

    def resume(self, pieces: Pieces) -> None:
        """Take over what an interrupted run has kept."""
        kept = pieces.piece(self.name)
        if kept is not None:
            self.returns, self.profile, self.runtime = kept["returns"], kept["profile"], kept["runtime"]
