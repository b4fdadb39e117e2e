"""The results in a terminal: a table, and one line per verdict. Readable without colour and in 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from rlquant.report.plain import note_simulated, plain_table
from rlquant.report.wording import (
    UNDEFINED,
    bytes_text,
    findings,
    interval_text,
    number_text,
    percent_text,
    row_labels,
    row_verdict,
    words,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["terminal_table", "verdict_lines"]

_STYLES = {"lost": "bold red", "undecided": "yellow", "retained": "green", "reference": "dim"}


def terminal_table(document: dict[str, Any], width: int = 80) -> Table:
    """One line per row of the document.

    Args:
        document: a valid results document.
        width: columns of the terminal. Where they suffice (about 120), IQM, worst decile, agreement,
            compression and p99 are shown too.
    """
    from rich.console import Console

    wide = _table(document, wide=True)
    fits = Console(width=1000).measure(wide).maximum <= width
    return wide if fits else _table(document, wide=False)


def _table(document: dict[str, Any], wide: bool) -> Table:
    from rich.text import Text

    rows = document["rows"]
    table = plain_table()
    if any((row["latency_us"] or {}).get("simulated") for row in rows):
        note_simulated(table)
    for header, flexible in _columns(words(document).score, wide):
        justify: Literal["left", "right"] = "left" if flexible else "right"
        table.add_column(header, justify=justify, no_wrap=not flexible, overflow="fold")
    for row, label in zip(rows, row_labels(rows), strict=True):
        verdict = row_verdict(document, row)
        style = _STYLES[verdict]
        cells = [Text(label, style="bold" if verdict != "lost" else style), *map(Text, _score(row, wide))]
        cells += [
            Text(_retention(row), style=style),
            Text("LOST" if verdict == "lost" else verdict, style=style),
        ]
        table.add_row(*cells, *map(Text, _cost(row, wide)))
    return table


def verdict_lines(document: dict[str, Any]) -> list[Text]:
    """What the table means, one line per compared row, losses first and in bold red with their numbers."""
    from rich.text import Text

    lines = []
    for finding in findings(document):
        style = _STYLES[finding.verdict]
        details = [finding.note] if finding.verdict == "retained" else [finding.detail, finding.note]
        detail = "".join(f" {text}" for text in details if text)
        lines.append(Text.assemble((f"{finding.headline}.", style), detail))
    return lines


def _columns(score: str, wide: bool) -> list[tuple[str, bool]]:
    """Header, and whether the column may wrap."""
    middle = [("IQM", False), ("worst 10%", False)] if wide else []
    cost = [("agree", False), ("weights", False), ("ratio", False)] if wide else [("weights", False)]
    speed = [("p50 us", False), ("p99 us", False)] if wide else [("p50 us", False)]
    return [
        ("precision", True),
        (f"{score} ± std", False),
        *middle,
        ("retention", False),
        ("verdict", False),
        *cost,
        *speed,
    ]


def _score(row: dict[str, Any], wide: bool) -> list[str]:
    score = row["score"]
    cells = [f"{number_text(score['mean'])} ± {number_text(score['std'])}"]
    return [*cells, number_text(score["iqm"]), number_text(score.get("worst_decile"))] if wide else cells


def _retention(row: dict[str, Any]) -> str:
    retention = row["retention"]
    if retention["value"] is None:
        return UNDEFINED
    return f"{retention['value']:.3f} {interval_text(retention['ci'])}"


def _cost(row: dict[str, Any], wide: bool) -> list[str]:
    agreement = (row["agreement"] or {}).get("action")
    latency = row["latency_us"] or {}
    mark = "~" if latency.get("simulated") else ""
    p50, p99 = (f"{mark}{number_text(latency[key])}" if latency else UNDEFINED for key in ("p50", "p99"))
    weights = bytes_text(row["bytes"]["weights"])
    if not wide:
        return [weights, p50]
    ratio = UNDEFINED if row["compression"] is None else f"{row['compression']:.2f}x"
    return [UNDEFINED if agreement is None else percent_text(agreement), weights, ratio, p50, p99]
