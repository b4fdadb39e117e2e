"""Play in real time: a terminal table, sentences and figures of what a slower chip costs at each precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from rlquant.report.figures import COLOURS, SYMBOLS, blank_figure, plain_figure
from rlquant.report.plain import note_simulated, plain_table
from rlquant.report.wording import UNDEFINED, number_text, percent_text, row_labels, words

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "factor_text",
    "realtime_entries",
    "realtime_figures",
    "realtime_sentences",
    "realtime_table",
    "time_text",
]

# Okabe and Ito's colours, which colour-blind people tell apart, less the yellow.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

Entry = dict[str, Any]


def realtime_entries(document: dict[str, Any]) -> list[tuple[str, Entry]]:
    """(row label, entry) of all that was played in real time, by row and slowdown."""
    return [(label, entry) for label, entries in _by_row(document) for entry in entries]


def _by_row(document: dict[str, Any]) -> list[tuple[str, list[Entry]]]:
    rows = document["rows"]
    played = [(label, row.get("realtime", [])) for row, label in zip(rows, row_labels(rows), strict=True)]
    return [
        (label, sorted(entries, key=lambda entry: entry["slowdown"])) for label, entries in played if entries
    ]


def time_text(microseconds: float) -> str:
    """A duration in the unit that suits it."""
    for factor, unit in ((1.0, "µs"), (1e3, "ms")):
        if microseconds < 999.5 * factor:
            return f"{microseconds / factor:.3g} {unit}"
    return f"{microseconds / 1e6:,.4g} s"


def factor_text(slowdown: float) -> str:
    """A slowdown, such as 1,000x."""
    return f"{slowdown:,.12g}x"


def realtime_table(document: dict[str, Any]) -> Table | None:
    """One line per precision and slowdown; None where nothing was played in real time."""
    from rich.text import Text

    entries = realtime_entries(document)
    if not entries:
        return None
    rate = entries[0][1]["control_rate_hz"]
    table = plain_table(f"In real time, {number_text(rate)} steps a second")
    table.add_column("precision", overflow="fold", min_width=9)
    for header in ("slower", "action", "acts/s", "delay", words(document).score, "kept", "verdict"):
        table.add_column(header, justify="right", no_wrap=True)
    styles = {"lost": "bold red", "undecided": "yellow", "retained": "green"}
    for label, entry in entries:
        verdict, kept = entry["retention"]["verdict"], entry["retention"]["value"]
        latency = entry["latency_us"]
        cells = [
            label,
            factor_text(entry["slowdown"]),
            f"{'~' if latency['simulated'] else ''}{time_text(latency['p50'])}",
            number_text(entry["actions_hz"]),
            f"{entry['delay_periods']:.2f}",
            number_text(entry["score"]["mean"]),
            UNDEFINED if kept is None else percent_text(kept),
        ]
        table.add_row(*cells, Text("LOST" if verdict == "lost" else verdict, style=styles[verdict]))
    if any(entry["latency_us"]["simulated"] for _, entry in entries):
        note_simulated(table)
    return table


def realtime_sentences(document: dict[str, Any]) -> list[str]:
    """For each precision, how slow the chip may be."""
    return [_sentence(label, entries, words(document).kept) for label, entries in _by_row(document)]


def _sentence(label: str, entries: Sequence[Entry], kept: str) -> str:
    """Up to where nothing is lost, and what is kept at the first loss."""
    verdicts = [entry["retention"]["verdict"] for entry in entries]
    count = verdicts.index("lost") if "lost" in verdicts else len(entries)
    share = percent_text(entries[count]["retention"]["value"]) if count < len(entries) else ""
    if count == 0:
        return f"{label} keeps {share} of the {kept} in real time even at {_speed(entries[0])}."
    last = entries[count - 1]
    if set(verdicts[:count]) == {"retained"}:
        sentence = f"{label} keeps the {kept} in real time up to {_speed(last)}"
    else:
        value = last["retention"]["value"]
        about = "cannot be judged" if value is None else f"keeps about {percent_text(value)} of the {kept}"
        sentence = f"{label} {about} in real time at {_speed(last)}, undecided"
    return f"{sentence}; at {_speed(entries[count])} it keeps {share}." if share else f"{sentence}."


def _speed(entry: Entry) -> str:
    return f"{factor_text(entry['slowdown'])} ({time_text(entry['latency_us']['p50'])} an action)"


def realtime_figures(document: dict[str, Any]) -> dict[str, Any]:
    """``slowdown`` and ``action_time``: the score of each precision against them; none without real time."""
    played = _by_row(document)
    if not played:
        return {}
    factors = sorted({entry["slowdown"] for _, entries in played for entry in entries})
    slowdown = _against(document, "slowdown, times", lambda entry: float(entry["slowdown"]))
    slowdown.update_xaxes(tickvals=factors, tickformat="~s", tickangle=0)
    period = 1e3 / played[0][1][0]["control_rate_hz"]
    action = _against(document, "time of an action, p50, ms", lambda entry: entry["latency_us"]["p50"] / 1e3)
    action.add_vline(
        x=period, line={"color": COLOURS["reference"], "width": 1.2, "dash": "dash"}, layer="below"
    )
    # A shape lies at the value on a logarithmic axis, an annotation at its logarithm.
    where = {"x": math.log10(period), "y": 1, "yref": "paper", "yanchor": "bottom"}
    action.add_annotation(where | {"text": "one period", "showarrow": False, "font": {"size": 12}})
    return {"slowdown": plain_figure(slowdown), "action_time": plain_figure(action)}


def _against(document: dict[str, Any], title: str, place: Callable[[Entry], float]) -> Any:
    """The mean score of each precision on a logarithmic axis; symbols tell verdicts, hollow ones are simulated."""
    figure = blank_figure(
        400,
        xaxis={"title": {"text": title}, "type": "log"},
        yaxis={"title": {"text": f"mean {words(document).score}"}},
        margin={"l": 12, "r": 16, "t": 64, "b": 12},
        showlegend=True,
        legend={"orientation": "h", "y": 1.08, "yanchor": "bottom", "x": 0},
    )
    for i, (label, entries) in enumerate(_by_row(document)):
        _add_line(
            figure, escape(label), entries, [place(entry) for entry in entries], _PALETTE[i % len(_PALETTE)]
        )
    reference = document["rows"][0]["score"]["mean"]
    figure.add_hline(
        y=reference, line={"color": COLOURS["reference"], "width": 1.2, "dash": "dot"}, layer="below"
    )
    return figure


def _add_line(
    figure: Any, label: str, entries: Sequence[Entry], places: Sequence[float], colour: str
) -> None:
    """One precision: its mean scores with their intervals, each marked by its verdict."""
    means = [entry["score"]["mean"] for entry in entries]
    lows, highs = (
        [
            mean if entry["score"]["ci"][end] is None else entry["score"]["ci"][end]
            for mean, entry in zip(means, entries, strict=True)
        ]
        for end in (0, 1)
    )
    symbols = [
        SYMBOLS[entry["retention"]["verdict"]] + ("-open" if entry["latency_us"]["simulated"] else "")
        for entry in entries
    ]
    figure.add_scatter(
        x=list(places),
        y=means,
        name=label,
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 9, "symbol": symbols},
        error_y={
            "type": "data",
            "array": [high - mean for high, mean in zip(highs, means, strict=True)],
            "arrayminus": [mean - low for low, mean in zip(lows, means, strict=True)],
            "thickness": 1.2,
            "width": 3,
        },
        customdata=[f"{factor_text(entry['slowdown'])}, {_hover(entry)}" for entry in entries],
        hovertemplate=f"<b>{label}</b> %{{customdata}}<br>score %{{y:.5g}}<extra></extra>",
    )


def _hover(entry: Entry) -> str:
    return (
        f"{time_text(entry['latency_us']['p50'])} an action, {number_text(entry['actions_hz'])} a second: "
        f"{entry['retention']['verdict']}"
    )
