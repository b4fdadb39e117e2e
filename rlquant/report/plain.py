"""The look that all tables in a terminal share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["note_simulated", "plain_table"]


def plain_table(title: str | None = None) -> Table:
    """An empty table with a line under its head and nothing else drawn."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, title=title)
    table.title_justify = "left"
    return table


def note_simulated(table: Table) -> None:
    """Say below a table what ``~`` before a latency means."""
    table.caption = "~ simulated: not computed with the packed low-bit weights"
    table.caption_justify = "left"
