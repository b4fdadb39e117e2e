"""What a workload takes on a device, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlquant.report.plain import plain_table
from rlquant.report.wording import bytes_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["cards_table", "memory_lines", "plans_table"]

# Columns of the table, and the parts that each adds up.
_COLUMNS = {
    "weights": ("weights",),
    "KV cache": ("kv_cache",),
    "activations": ("activations",),
    "logits": ("logits",),
    "adapters": ("adapters", "gradients", "optimizer"),
    "workspace": ("workspace",),
}
_NONE = "-"


def plans_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per precision, in MiB: what lives at the peak, the peak, and what a card must have.

    Args:
        rows: ``precisions`` of a memory document; see :func:`rlquant.planning.memory_document`.
    """
    columns = {name: parts for name, parts in _COLUMNS.items() if any(_sum(row, parts) for row in rows)}
    table = plain_table()
    table.add_column("MiB", overflow="fold", min_width=9)
    for header in (*columns, "peak", "needs"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("smallest card", justify="right", overflow="fold")
    for row in rows:
        sizes = [*(_sum(row, parts) for parts in columns.values()), row["peak"], row["needed"]]
        table.add_row(row["precision"], *map(_mebibytes, sizes), row["smallest_card"] or _NONE)
    return table


def _sum(row: dict[str, Any], parts: tuple[str, ...]) -> int:
    return sum(row["parts"][part] for part in parts)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size else _NONE


def cards_table(rows: Sequence[dict[str, Any]], cards: Sequence[dict[str, Any]]) -> Table:
    """One line per card, one column per precision: the largest batch and the largest length that fit.

    Args:
        rows: ``precisions`` of a memory document.
        cards: its ``cards``.
    """
    table = plain_table()
    table.add_column("card", no_wrap=True)
    table.add_column("usable", justify="right", no_wrap=True)
    for row in rows:
        table.add_column(row["precision"], justify="right", overflow="fold")
    for card in cards:
        cells = (_largest(row["largest"][card["name"]]) for row in rows)
        table.add_row(card["name"], bytes_text(card["usable"]), *cells)
    return table


def _largest(found: dict[str, int]) -> str:
    batch, seq = found["batch"], found["seq"]
    return f"{batch:,} / {seq:,}" if batch or seq else _NONE


def memory_lines(document: dict[str, Any]) -> list[str]:
    """Sentences below the tables: what the numbers mean."""
    work, stages = document["workload"], {row["stage"] for row in document["precisions"]}
    lines = [
        f"The peak comes during: {', '.join(sorted(stages))}. It is what torch.cuda.max_memory_allocated reports; "
        f"needs adds {document['fragmentation']:.0%} for the allocator's gaps and "
        f"{bytes_text(document['context'])} for CUDA's context."
    ]
    many = "batch" if work["task"] not in ("dpo", "reward") else "batch of pairs"
    if document["cards"]:
        lines.append(
            f"By card: the largest {many} at {work['seq']:,} tokens / the largest length at "
            f"{work['batch']:,} (up to the {document['model']['longest']:,} tokens that the model was made for)."
        )
    return lines
