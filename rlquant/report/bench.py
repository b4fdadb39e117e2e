"""Latencies side by side in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlquant.report.plain import note_simulated, plain_table
from rlquant.report.wording import UNDEFINED, bytes_text, number_text, percent_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["bench_lines", "bench_table"]


def bench_table(contest: Any, width: int = 80) -> Table:
    """One line per precision and runtime: microseconds of one action, observation in to action out.

    Args:
        contest: a :class:`rlquant.control.contest.Contest`.
        width: columns of the terminal. Where they suffice (about 100), p90, the slowest call and the bytes that
            a call allocates are shown too.
    """
    from rich.console import Console

    wide = _table(contest, wide=True)
    fits = Console(width=1000).measure(wide).maximum <= width
    return wide if fits else _table(contest, wide=False)


def _table(contest: Any, wide: bool) -> Table:
    table = plain_table()
    for header in ("precision", "runtime"):
        table.add_column(header, overflow="fold", min_width=9)
    for each in contest.timings:
        cells = _cells(each)
        shown = {header: text for header, text in cells.items() if wide or header not in _WIDE}
        if not table.row_count:
            for header in shown:
                table.add_column(header, justify="right", no_wrap=True)
        table.add_row(each.precision, each.runtime, *shown.values())
    if any(each.latency.simulated for each in contest.timings):
        note_simulated(table)
    return table


_WIDE = ("p90", "max", "alloc")


def _cells(timing: Any) -> dict[str, str]:
    """What is shown of a timing, by column."""
    seen = timing.latency
    percentiles = {"p50 us": seen.p50, "p90": seen.p90, "p99": seen.p99, "p99.9": seen.p999, "max": seen.max}
    mark = "~" if seen.simulated else ""
    return {
        **{header: f"{mark}{number_text(value)}" for header, value in percentiles.items()},
        "jitter": number_text(timing.jitter_us),
        "cold": number_text(timing.cold_us),
        "late": UNDEFINED if timing.misses is None else percent_text(timing.misses),
        "alloc": bytes_text(timing.allocation.bytes_per_call),
        "faster": f"{timing.speedup:.1f}x",
    }


def bench_lines(contest: Any) -> list[str]:
    """Sentences below the table: what the columns mean, who allocates nothing, and what the machine did."""
    rate = contest.control_rate_hz
    late = "late: unknown, as the environment names no control rate"
    if rate:
        late = f"late: longer than a control period of {1e3 / rate:g} ms ({rate:g} Hz)"
    lean = [f"{each.precision} {each.runtime}" for each in contest.timings if each.allocation.only_action]
    lines = [f"jitter: p99 - p50; cold: the first call; {late}."]
    if lean:
        verb = "allocates" if len(lean) == 1 else "allocate"
        lines.append(f"{', '.join(lean)} {verb} nothing but the action, as far as Python and NumPy know.")
    return [*lines, *_machine(contest.machine)]


def _machine(machine: Any) -> list[str]:
    where = "not pinned to a core" if machine.core is None else f"pinned to core {machine.core}"
    load = (
        "" if machine.load is None else f", load {machine.load[0]:.1f} before and {machine.load[1]:.1f} after"
    )
    clock = "" if machine.mhz is None else f", {machine.governor} at {machine.mhz:,.0f} MHz"
    remarks = machine.remarks()
    said = f"One thread, {where}{load}{clock}."
    return [said, *(f"{remark[0].upper()}{remark[1:]}." for remark in remarks)]
