"""A search's findings in a terminal: what each tensor costs, and what was found on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlquant.measure import short_name
from rlquant.report.plain import plain_table
from rlquant.report.wording import UNDEFINED, bytes_text, percent_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["front_table", "sensitivity_table"]


def sensitivity_table(tensors: Sequence[dict[str, Any]], most: int = 24) -> Table:
    """One line per tensor that it costs most to quantize alone: what is kept, or added, at so many bits.

    Args:
        tensors: of ``tune.json``.
        most: lines to show.
    """
    counts = sorted({each["bits"] for each in tensors}, reverse=True)
    lines: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for each in tensors:
        lines.setdefault((each["layer"], each["role"], each["tensor"]), {})[each["bits"]] = each
    rewarded = any(each["retention"] is not None for each in tensors)
    title = "Reward kept" if rewarded else "Divergence from the float model, nats a token,"
    table = _table(
        f"{title} with one tensor alone at", ["layer", "role", "tensor"], [f"{n} bits" for n in counts]
    )
    worst = sorted(lines, key=lambda names: -max(each["divergence"] for each in lines[names].values()))
    shown = set(worst[:most])
    for names, cost in lines.items():
        if names in shown:
            table.add_row(*names, *(_cost(cost.get(count), rewarded) for count in counts))
    if len(lines) > most:
        table.caption = f"{len(lines) - most} that cost less are in tune.json"
    return table


def front_table(trials: Sequence[dict[str, Any]], unit: str = "episodes") -> Table:
    """One line per scheme that no other beats in both bytes and reward.

    Args:
        trials: the front of ``tune.json``.
        unit: what auditions are made of.
    """
    table = _table("Pareto front of the auditions", ["scheme", "method"], ["bytes", "kept", unit, ""])
    for trial in trials:
        kept = _share(trial["retention"])
        table.add_row(
            short_name(trial["scheme"]),
            trial["method"],
            bytes_text(trial["bytes"]),
            kept,
            str(trial["episodes"]),
            "passes" if trial["passed"] else "fails",
        )
    return table


def _cost(tensor: dict[str, Any] | None, rewarded: bool) -> str:
    if tensor is None:
        return UNDEFINED
    return _share(tensor["retention"]) if rewarded else f"{tensor['divergence']:.5f}"


def _table(title: str, names: list[str], numbers: list[str]) -> Table:
    table = plain_table(title)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _share(value: float | None) -> str:
    return UNDEFINED if value is None or value != value else percent_text(value)
