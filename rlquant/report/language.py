"""What a language model's evaluation adds: perplexity, distance from the reference, preferences, generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlquant.report.plain import note_simulated, plain_table
from rlquant.report.wording import UNDEFINED, bytes_text, number_text, percent_text, row_labels

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["generation_entries", "generation_table", "language_rows", "language_table"]


def language_rows(document: dict[str, Any]) -> list[dict[str, str]]:
    """For each row its label, and in words: perplexity, its change, divergence, same token, preferred answers."""
    rows = [(label, row) for label, row in _labelled(document) if row.get("language")]
    if not rows:
        return []
    base = rows[0][1]["language"]["perplexity"]
    return [_described(label, row["language"], base) for label, row in rows]


def generation_entries(document: dict[str, Any]) -> list[dict[str, str]]:
    """One entry for each row and batch size, in words."""
    return [
        {
            "label": label,
            "batch": str(timed["batch"]),
            "first": f"{number_text(timed['first_token_ms'])} ms",
            "step": f"{number_text(timed['step']['p50'] / 1e3)} ms",
            "rate": number_text(timed["tokens_per_second"]),
            "peak": bytes_text(timed.get("peak_bytes")),
            "mark": " †" if timed["step"]["simulated"] else "",
        }
        for label, row in _labelled(document)
        for timed in (row.get("language") or {}).get("generation", [])
    ]


def language_table(document: dict[str, Any]) -> Table | None:
    """One line per precision; None for control policies."""
    rows = language_rows(document)
    if not rows:
        return None
    table = plain_table()
    preferred = any(row["preferred"] != UNDEFINED for row in rows)
    headers = ["precision", "perplexity", "change", "KL", "same token", *(["preferred"] if preferred else [])]
    for number, header in enumerate(headers):
        table.add_column(header, justify="right" if number else "left", overflow="fold")
    for row in rows:
        cells = [row["label"], row["perplexity"], row["change"], row["kl"], row["top1"]]
        table.add_row(*cells, *([row["preferred"]] if preferred else []))
    return table


def generation_table(timings: Sequence[dict[str, Any]]) -> Table:
    """One line per precision and batch size, of the timings of ``bench.json``; faster than the first at that batch."""
    table = plain_table()
    headers = (
        "precision",
        "runtime",
        "weights",
        "batch",
        "first ms",
        "step ms",
        "tokens/s",
        "faster",
        "peak",
    )
    for number, header in enumerate(headers):
        table.add_column(header, justify="left" if number < 2 else "right", overflow="fold")
    first: dict[int, float] = {}
    for timed in timings:
        base = first.setdefault(timed["batch"], timed["tokens_per_second"])
        mark = "~" if timed["step"]["simulated"] else ""
        table.add_row(
            timed["precision"],
            timed["runtime"],
            bytes_text(timed["weights"]),
            str(timed["batch"]),
            number_text(timed["first_token_ms"]),
            f"{mark}{number_text(timed['step']['p50'] / 1e3)}",
            number_text(timed["tokens_per_second"]),
            f"{timed['tokens_per_second'] / base:.1f}x",
            bytes_text(timed["peak_bytes"]),
        )
    if any(timed["step"]["simulated"] for timed in timings):
        note_simulated(table)
    return table


def _labelled(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(zip(row_labels(document["rows"]), document["rows"], strict=True))


def _described(label: str, language: dict[str, Any], base: float) -> dict[str, str]:
    agreement, preferences = language["agreement"], language["preferences"]
    change = language["perplexity"] / base - 1
    return {
        "label": label,
        "perplexity": f"{language['perplexity']:.3f}",
        "change": UNDEFINED if agreement is None else f"{100 * change:+.2f}%",
        "kl": UNDEFINED if agreement is None else f"{agreement['kl']:.4f}",
        "top1": UNDEFINED if agreement is None else percent_text(agreement["top1"]),
        "preferred": UNDEFINED if preferences is None else percent_text(preferences["summed"]),
        "preferred_each": UNDEFINED if preferences is None else percent_text(preferences["per_token"]),
    }
