"""Latencies side by side in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlquant.report.plain import note_simulated, plain_table
from rlquant.report.wording import UNDEFINED, number_text, percent_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["bench_table"]


def bench_table(timings: Sequence[Any]) -> Table:
    """One line per precision and runtime: microseconds of one action, observation in to action out.

    Args:
        timings: of :func:`rlquant.control.contest.contest`.
    """
    table = plain_table()
    for header in ("precision", "runtime"):
        table.add_column(header, overflow="fold", min_width=9)
    for header in ("p50 us", "p99", "p99.9", "cold", "late", "faster"):
        table.add_column(header, justify="right", no_wrap=True)
    for each in timings:
        mark, seen = "~" if each.latency.simulated else "", each.latency
        numbers = [f"{mark}{number_text(value)}" for value in (seen.p50, seen.p99, seen.p999)]
        late = UNDEFINED if each.misses is None else percent_text(each.misses)
        table.add_row(
            each.precision, each.runtime, *numbers, number_text(each.cold_us), late, f"{each.speedup:.1f}x"
        )
    if any(each.latency.simulated for each in timings):
        note_simulated(table)
    return table
