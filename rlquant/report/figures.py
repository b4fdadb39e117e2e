"""The figures of the report, as plain Plotly JSON (data, layout).

Names from the document are escaped, for Plotly reads markup in its labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from rlquant.report.wording import row_labels, row_verdict, words

__all__ = ["COLOURS", "SYMBOLS", "blank_figure", "figures", "pareto_front", "plain_figure"]

COLOURS = {"reference": "#475569", "retained": "#15803d", "undecided": "#b45309", "lost": "#c81e1e"}
SYMBOLS = {"reference": "square", "retained": "circle", "undecided": "diamond", "lost": "x"}

MAX_POINTS = 4000  # above this many episodes in all, only boxes are drawn
MAX_PAIRED = 200  # above this many episodes, no lines join the same seed
MAX_LAYERS = 12  # histograms of one row; the noisiest layers are shown

_GRID = "#e2e8f0"
_MUTED = "#94a3b8"


def figures(document: dict[str, Any]) -> dict[str, Any]:
    """All figures that the document has data for: {name: figure}, and "weights": {row label: [figure]}."""
    drawn = {"retention": _retention(document), "size": _against_size(document)}
    if any(row["latency_us"] for row in document["rows"]):
        drawn["latency"] = _against_latency(document)
    drawn["episodes"] = _episodes(document)
    weights = {
        label: _weights(row["weights"])
        for row, label in zip(document["rows"], row_labels(document["rows"]), strict=True)
        if row.get("weights")
    }
    plain = {name: plain_figure(figure) for name, figure in drawn.items()}
    return plain | {
        "weights": {label: [plain_figure(f) for f in layers] for label, layers in weights.items()}
    }


def pareto_front(cost: Sequence[float], score: Sequence[float]) -> list[int]:
    """Indices of the points that no other beats in both cost (lower) and score (higher), by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], -score[i])):
        if not front or score[i] > score[front[-1]]:
            front.append(i)
    return front


def plain_figure(figure: Any) -> Any:
    """A Plotly figure as plain JSON."""
    return json.loads(figure.to_json())


def blank_figure(height: int, **layout: Any) -> Any:
    """A figure with nothing drawn, in the look that all figures share."""
    from plotly import graph_objects as go

    axis = {"gridcolor": _GRID, "zeroline": False, "linecolor": _MUTED, "automargin": True}
    base = {
        "template": "none",
        "height": height,
        "margin": {"l": 12, "r": 16, "t": 34, "b": 12},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1e293b"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hoverlabel": {"bgcolor": "white", "font": {"size": 13}},
    }
    for name in ("xaxis", "yaxis"):
        base[name] = axis | layout.pop(name, {})
    return go.Figure(layout=base | layout)


def _labelled(document: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    """(row, escaped label, verdict) for each row."""
    rows = document["rows"]
    return [
        (row, escape(label), row_verdict(document, row))
        for row, label in zip(rows, row_labels(rows), strict=True)
    ]


def _retention(document: dict[str, Any]) -> Any:
    """Forest plot: the retention of each row with its interval, and the lines it is judged by."""
    labelled = _labelled(document)
    line = 1 - document["settings"]["margin"]
    figure = blank_figure(
        96 + 34 * len(labelled),
        xaxis={"title": {"text": f"share of the {words(document).kept} kept"}, "tickformat": "~%"},
        yaxis={
            "categoryorder": "array",
            "categoryarray": [n for _, n, _ in labelled][::-1],
            "type": "category",
            "range": [-0.7, len(labelled) - 0.3],
        },
        margin={"l": 12, "r": 16, "t": 40, "b": 12},
    )
    for row, label, verdict in labelled:
        value, (low, high) = row["retention"]["value"], row["retention"]["ci"]
        if value is None:
            figure.add_scatter(
                x=[(line + 1) / 2],
                y=[label],
                mode="text",
                text="cannot be judged",
                textfont={"color": COLOURS[verdict]},
            )
            continue
        known = low is not None and high is not None
        spread = {"array": [high - value], "arrayminus": [value - low]} if known else {"array": [0]}
        figure.add_scatter(
            x=[value],
            y=[label],
            error_x=spread | {"type": "data", "thickness": 2, "width": 5, "color": COLOURS[verdict]},
            mode="markers",
            marker={"size": 11, "color": COLOURS[verdict], "symbol": SYMBOLS[verdict]},
            hovertemplate=f"<b>{label}</b>: {verdict}<br>kept %{{x:.2%}}"
            + (f"<br>interval {low:.2%} to {high:.2%}" if known else "")
            + "<extra></extra>",
        )
    _line(figure, 1.0, "reference", "solid", "left")
    _line(figure, line, f"allowed {line:.4g}", "dash", "right")
    return figure


def _line(figure: Any, x: float, text: str, dash: str, anchor: str) -> None:
    figure.add_vline(x=x, line={"color": COLOURS["reference"], "width": 1.2, "dash": dash}, layer="below")
    figure.add_annotation(
        x=x,
        y=1,
        yref="paper",
        yanchor="bottom",
        xanchor=anchor,
        text=text,
        showarrow=False,
        font={"size": 12, "color": COLOURS["reference"]},
    )


def _against_size(document: dict[str, Any]) -> Any:
    points = [
        (row, label, verdict, row["bytes"]["weights"] / 1024, False)
        for row, label, verdict in _labelled(document)
    ]
    return _against(document, points, "weights, KiB (packed, with scales)")


def _against_latency(document: dict[str, Any]) -> Any:
    points = [
        (row, label, verdict, row["latency_us"]["p50"], row["latency_us"]["simulated"])
        for row, label, verdict in _labelled(document)
        if row["latency_us"]
    ]
    return _against(document, points, "latency of one action, p50, µs")


def _against(document: dict[str, Any], points: list[tuple[Any, str, str, float, bool]], title: str) -> Any:
    """Mean score against a cost. Simulated points are hollow and stay out of the Pareto front."""
    costs = [cost for *_, cost, _ in points]
    figure = blank_figure(
        400,
        xaxis={"title": {"text": title}} | _cost_axis(costs),
        yaxis={"title": {"text": f"mean {words(document).score}"}},
        margin={"l": 12, "r": 48, "t": 34, "b": 12},
    )
    real = [(cost, row["score"]["mean"]) for row, _, _, cost, simulated in points if not simulated]
    front = [real[i] for i in pareto_front([c for c, _ in real], [s for _, s in real])]
    figure.add_scatter(
        x=[cost for cost, _ in front],
        y=[score for _, score in front],
        mode="lines",
        line={"shape": "hv", "color": _MUTED, "width": 2, "dash": "dot"},
        hoverinfo="skip",
    )
    by_cost = sorted(range(len(points)), key=lambda i: costs[i])
    for rank, i in enumerate(by_cost):
        row, label, verdict, cost, simulated = points[i]
        named = len(points) <= 8 or (cost, row["score"]["mean"]) in front
        _add_point(figure, row, label, verdict, cost, simulated, rank if named else None)
    return figure


def _cost_axis(costs: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with a tick at each power of two where the costs span more than a factor of 8."""
    low, high = min(costs), max(costs)
    if low <= 0 or high <= 8 * low:
        return {}
    ticks = [2.0**k for k in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _add_point(
    figure: Any, row: dict[str, Any], label: str, verdict: str, cost: float, simulated: bool, rank: int | None
) -> None:
    """One point; a ``rank`` asks for its name beside it, alternating so that neighbours do not collide."""
    positions = ("top right", "bottom right", "top left", "bottom left")
    low, high = row["score"]["ci"]
    mean = row["score"]["mean"]
    spread = {} if low is None or high is None else {"array": [high - mean], "arrayminus": [mean - low]}
    figure.add_scatter(
        x=[cost],
        y=[mean],
        mode="markers" if rank is None else "markers+text",
        text=[label],
        textposition=positions[(rank or 0) % len(positions)],
        textfont={"size": 12, "color": COLOURS[verdict]},
        cliponaxis=False,
        error_y=spread | {"type": "data", "thickness": 1.2, "width": 3, "color": COLOURS[verdict]},
        marker={
            "size": 11,
            "color": COLOURS[verdict],
            "symbol": _symbol(verdict, simulated),
            "line": {"width": 2 if simulated else 0},
        },
        hovertemplate=f"<b>{label}</b>: {verdict}<br>score %{{y:.4g}}<br>cost %{{x:.4g}}"
        + ("<br>simulated" if simulated else "")
        + "<extra></extra>",
    )


def _symbol(verdict: str, simulated: bool) -> str:
    hollow = {"lost": "x-thin-open"}
    return hollow.get(verdict, f"{SYMBOLS[verdict]}-open") if simulated else SYMBOLS[verdict]


def _episodes(document: dict[str, Any]) -> Any:
    """Box and points per row; a seed has one horizontal offset in all rows, and a line joins its scores."""
    labelled, term = _labelled(document), words(document)
    scores = [row["score"]["episodes"] for row, _, _ in labelled]
    figure = blank_figure(
        420,
        xaxis={
            "tickvals": list(range(len(labelled))),
            "ticktext": [label for _, label, _ in labelled],
            "showgrid": False,
            "range": [-0.6, len(labelled) - 0.4],
        },
        yaxis={"title": {"text": f"{term.score} of one {term.sample}"}},
    )
    offsets = np.random.default_rng(0).uniform(-0.28, 0.28, max(len(s) for s in scores)).tolist()
    small = sum(len(s) for s in scores) <= MAX_POINTS
    if small and len(labelled) > 1 and len(set(map(len, scores))) == 1 and len(scores[0]) <= MAX_PAIRED:
        _join_seeds(figure, scores, offsets)
    for i, (_, label, verdict) in enumerate(labelled):
        figure.add_box(
            x=[i] * len(scores[i]),
            y=scores[i],
            boxpoints=False if small else "suspectedoutliers",
            width=0.7,
            line={"color": COLOURS[verdict], "width": 1.4},
            fillcolor="rgba(255,255,255,0.35)",
            hoverinfo="skip",
        )
        if small:
            figure.add_scatter(
                x=[i + offset for offset in offsets[: len(scores[i])]],
                y=scores[i],
                mode="markers",
                marker={"size": 5, "color": COLOURS[verdict], "opacity": 0.55},
                hovertemplate=f"<b>{label}</b><br>{term.sample} %{{pointNumber}}: %{{y:.5g}}<extra></extra>",
            )
    return figure


def _join_seeds(figure: Any, scores: list[list[float]], offsets: list[float]) -> None:
    xs: list[float | None] = []
    ys: list[float | None] = []
    for episode, offset in enumerate(offsets):
        xs += [i + offset for i in range(len(scores))] + [None]
        ys += [row[episode] for row in scores] + [None]
    figure.add_scatter(
        x=xs, y=ys, mode="lines", line={"color": "rgba(100,116,139,0.16)", "width": 1}, hoverinfo="skip"
    )


def _weights(layers: list[dict[str, Any]]) -> list[Any]:
    """One histogram per layer, before (filled) and after (bars); only the MAX_LAYERS noisiest."""
    noise = sorted(layers, key=lambda layer: np.inf if layer["sqnr_db"] is None else layer["sqnr_db"])
    chosen = {id(layer) for layer in noise[:MAX_LAYERS]}
    return [_histogram(layer) for layer in layers if id(layer) in chosen]


def _histogram(layer: dict[str, Any]) -> Any:
    sqnr = "" if layer["sqnr_db"] is None else f" · {layer['sqnr_db']:.1f} dB"
    figure = blank_figure(
        190, title={"text": escape(layer["layer"]) + sqnr, "font": {"size": 13}, "y": 0.97}, bargap=0
    )
    edges = np.asarray(layer["edges"])
    centres = ((edges[:-1] + edges[1:]) / 2).tolist()
    figure.add_bar(x=centres, y=layer["after"], marker={"color": "#2563eb"}, name="after")
    figure.add_scatter(
        x=centres,
        y=layer["before"],
        mode="lines",
        fill="tozeroy",
        line={"shape": "hvh", "width": 1.2, "color": "#64748b"},
        fillcolor="rgba(148,163,184,0.45)",
        name="before",
    )
    return figure
