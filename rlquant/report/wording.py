"""Numbers and verdicts in plain words, shared by the terminal table and the HTML report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlquant.measure import MORE_EPISODES_CAP, short_name

__all__ = [
    "UNDEFINED",
    "Finding",
    "Words",
    "bytes_text",
    "findings",
    "gain_sentence",
    "interval_text",
    "is_reference",
    "number_text",
    "percent_text",
    "row_labels",
    "row_verdict",
    "words",
]

Row = dict[str, Any]

UNDEFINED = "\u2013"
"""Stands where a figure is undefined or was not measured."""


@dataclass(frozen=True)
class Words:
    """What a kind of subject calls its score, what it may lose, one sample of it, and what scores nothing."""

    score: str
    kept: str
    sample: str
    floor: str = "random"


_WORDS = {
    "control": Words(score="return", kept="reward", sample="episode"),
    "language": Words(score="score", kept="score", sample="window"),
}


@dataclass(frozen=True)
class Finding:
    """One precision's verdict as a headline and the numbers behind it; ``note`` is worth reading anyway."""

    label: str
    verdict: str
    headline: str
    detail: str
    note: str = ""


def words(document: dict[str, Any]) -> Words:
    """The vocabulary of the document's subject, or of what it learned."""
    gain = document.get("gain")
    if gain:
        return Words(score="score", kept="gain", sample=gain["sample"], floor="base")
    return _WORDS[document["subject"]["kind"]]


def gain_sentence(document: dict[str, Any]) -> str:
    """What fine-tuning changed, with its interval; empty where nothing was learned."""
    gain = document.get("gain")
    if not gain:
        return ""
    count = len(document["rows"][0]["score"]["episodes"])
    notes = "".join(
        f"; {name.replace('_', ' ')} {number_text(before)} to {number_text(after)}"
        for name, (before, after) in gain["notes"].items()
    )
    return (
        f"{document['settings']['task'].upper()}: {gain['score']}, {gain['base']:.3f} before and {gain['tuned']:.3f} "
        f"after, {gain['difference']:+.3f} {interval_text(gain['ci'])} over {count} held-out {gain['sample']}s{notes}."
    )


def is_reference(document: dict[str, Any], row: Row) -> bool:
    """Whether ``row`` is the reference that the others are compared with: the first of its precision."""
    precision = document["reference"]["precision"]
    return row is next((r for r in document["rows"] if r["precision"] == precision), None)


def row_verdict(document: dict[str, Any], row: Row) -> str:
    """The verdict on ``row``, or "reference"."""
    return "reference" if is_reference(document, row) else row["retention"]["verdict"]


def row_labels(rows: Sequence[Row]) -> list[str]:
    """A distinct name for each row: its precision, with method, runtime or a number only where needed."""
    names = [short_name(row["precision"]) for row in rows]
    for key in ("method", "runtime"):
        count = Counter(names)
        varied = {n for n in count if len({r[key] for r, m in zip(rows, names, strict=True) if m == n}) > 1}
        names = [f"{n} {r[key]}" if n in varied else n for r, n in zip(rows, names, strict=True)]
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return labels


def number_text(value: float | None) -> str:
    """A score with three to four digits that matter; a dash for what is undefined."""
    if value is None:
        return UNDEFINED
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3g}" if 0 < size < 0.1 else f"{value:.2f}"


def percent_text(share: float) -> str:
    """A share as a percentage; a small loss is never rounded away to 100%, nor a small share to 0%."""
    percent = 100 * share
    if percent == 100:
        return "100%"
    if 99.95 <= percent < 100:
        return f"{math.floor(100 * percent) / 100:.2f}%"
    if 0 < abs(percent) < 0.05:
        return f"{percent:.1g}%"
    return f"{percent:.1f}%"


def interval_text(ci: Sequence[float | None]) -> str:
    """[low, high], or a dash where undefined."""
    low, high = ci
    return UNDEFINED if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def bytes_text(count: int | None) -> str:
    """Bytes in binary units, or a dash."""
    if count is None:
        return UNDEFINED
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def findings(document: dict[str, Any]) -> list[Finding]:
    """The verdict on each row but the reference: lost (worst on top), then undecided, then retained."""
    rows = document["rows"]
    order = {"lost": 0, "undecided": 1, "retained": 2}
    compared = [
        (row, label)
        for row, label in zip(rows, row_labels(rows), strict=True)
        if not is_reference(document, row)
    ]
    compared.sort(key=lambda pair: _severity(pair[0], order))
    return [_finding(document, row, label) for row, label in compared]


def _severity(row: Row, order: dict[str, int]) -> tuple[int, float]:
    retention = row["retention"]
    by_loss = retention["verdict"] == "lost" and retention["value"] is not None
    return order[retention["verdict"]], retention["value"] if by_loss else 0.0


def _finding(document: dict[str, Any], row: Row, label: str) -> Finding:
    verdict, value = row["retention"]["verdict"], row["retention"]["value"]
    kept = words(document).kept
    parts = [_score_sentence(document, row)]
    if value is None:
        headline = f"{label} cannot be judged"
    elif verdict == "lost":
        headline = (
            f"{label} LOSES {percent_text(1 - value)} of the {kept}"
            if value > 0
            else f"{label} LOSES ALL of the {kept}: no better than {words(document).floor}"
        )
    elif verdict == "undecided":
        headline = f"{label} is undecided: it keeps about {percent_text(value)} of the {kept}"
    else:
        headline = f"{label} keeps {percent_text(value)} of the {kept}"
    if value is not None:
        parts.append(_interval_sentence(document, row))
    if verdict == "undecided":
        parts.append(_way_out(document, row))
    return Finding(label, verdict, headline, " ".join(part for part in parts if part), _shift_sentence(row))


def _shift_sentence(row: Row) -> str:
    """What closed-loop calibration found: how far the quantized agent's own inputs lie from what was known."""
    rounds = []
    for shift in row.get("shifts", []):
        moved = max(max(distances) for distances in shift["wasserstein"].values())
        outside = [share for shares in shift["outside"].values() for share in shares]
        rounds.append(
            f"by up to {moved:.2f} standard deviations, "
            f"{percent_text(sum(outside) / len(outside))} of values beyond the calibrated range"
        )
    return f"Playing quantized, observations moved {'; then '.join(rounds)}." if rounds else ""


def _score_sentence(document: dict[str, Any], row: Row) -> str:
    term, reference = words(document), document["reference"]
    text = f"Mean {term.score} {number_text(row['score']['mean'])}"
    base = next((r for r in document["rows"] if is_reference(document, r)), None)
    if base is not None:
        text += f" against {number_text(base['score']['mean'])} in {reference['precision']}"
    if reference["random_score"] is not None:
        text += f" ({term.floor}: {number_text(reference['random_score'])})"
    n = len(row["score"]["episodes"])
    return f"{text}, over {n} {term.sample}{'s' if n != 1 else ''}."


def _interval_sentence(document: dict[str, Any], row: Row) -> str:
    settings, (low, high) = document["settings"], row["retention"]["ci"]
    if low is None or high is None:
        return ""
    confidence = f"{100 * settings.get('interval_confidence', settings['confidence']):.4g}%"
    return (
        f"Keeps {percent_text(low)} to {percent_text(high)} ({confidence} interval); "
        f"at least {100 * (1 - settings['margin']):.4g}% is asked for."
    )


def _way_out(document: dict[str, Any], row: Row) -> str:
    sample = words(document).sample
    more = row["retention"].get("more_episodes")
    if row["retention"]["value"] is None or more is None:
        reason = row["retention"].get("reason", "").replace("random", words(document).floor)
        return f"{reason[:1].upper()}{reason[1:]}." if reason else ""
    if more >= MORE_EPISODES_CAP:
        return f"It lies on the line: even {more:,} more {sample}s might not decide."
    return f"About {more:,} more {sample}{'s' if more != 1 else ''} would decide."
