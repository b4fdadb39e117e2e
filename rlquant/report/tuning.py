"""A search's findings in a terminal: what each tensor costs, and what was found on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlquant.report.plain import plain_table
from rlquant.report.wording import UNDEFINED, bytes_text, percent_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["front_table", "sensitivity_table"]


def sensitivity_table(tensors: Sequence[dict[str, Any]]) -> Table:
    """One line per tensor: the share of reward that is kept where it alone has so many bits.

    Args:
        tensors: of ``tune.json``.
    """
    counts = sorted({each["bits"] for each in tensors}, reverse=True)
    table = _table(
        "Reward kept with one tensor alone at", ["layer", "role", "tensor"], [f"{n} bits" for n in counts]
    )
    lines: dict[tuple[str, str, str], dict[int, Any]] = {}
    for each in tensors:
        lines.setdefault((each["layer"], each["role"], each["tensor"]), {})[each["bits"]] = each["retention"]
    for names, kept in lines.items():
        table.add_row(*names, *(_share(kept.get(count)) for count in counts))
    return table


def front_table(trials: Sequence[dict[str, Any]]) -> Table:
    """One line per scheme that no other beats in both bytes and reward."""
    table = _table("Pareto front of the auditions", ["scheme", "method"], ["bytes", "kept", "episodes", ""])
    for trial in trials:
        kept = _share(trial["retention"])
        table.add_row(
            trial["scheme"],
            trial["method"],
            bytes_text(trial["bytes"]),
            kept,
            str(trial["episodes"]),
            "passes" if trial["passed"] else "fails",
        )
    return table


def _table(title: str, names: list[str], numbers: list[str]) -> Table:
    table = plain_table(title)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return UNDEFINED if value is None or value != value else percent_text(value)
