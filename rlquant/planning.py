"""What the command ``memory`` does, once its options are parsed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlquant.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rlquant.llm.architecture import Architecture
    from rlquant.llm.cards import Card
    from rlquant.llm.memory import MemoryPlan, Workload
    from rlquant.llm.precision import Precision

__all__ = ["MemoryOptions", "memory_document", "run_memory"]

SCHEMA = "rlquant.memory/1"


@dataclass(frozen=True)
class MemoryOptions:
    """Options of ``rlquant memory``; see its help."""

    model: str
    gpu: str | None
    task: str
    precisions: tuple[str, ...]
    embedding: str | None
    dtype: str
    seq: int
    batch: int
    completion: int | None
    kv: str
    rank: int
    adapters: str
    optimizer: str
    checkpointing: bool
    full_logits: bool
    padded: bool
    json: bool


def run_memory(options: MemoryOptions) -> None:
    """Print what a workload takes at each precision and what fits on which card."""
    from rlquant.llm.architecture import read_architecture
    from rlquant.llm.cards import CARDS, find_card
    from rlquant.llm.memory import Workload
    from rlquant.llm.precision import Precision

    workload = Workload(
        task=options.task,
        batch=options.batch,
        seq=options.seq,
        completion=options.completion,
        kv=options.kv,
        rank=options.rank,
        adapters=options.adapters,
        optimizer=options.optimizer,
        checkpointing=options.checkpointing,
        full_logits=options.full_logits,
        padded=options.padded,
    )
    precisions = [
        Precision.parse(name, embedding=options.embedding, dtype=options.dtype) for name in options.precisions
    ]
    cards = [find_card(options.gpu)] if options.gpu else CARDS
    model = read_architecture(options.model)
    if workload.seq > model.longest:
        raise InputError(f"--seq {workload.seq} is beyond the {model.longest} tokens that {model.name} takes")
    document = memory_document(model, precisions, workload, cards)
    if options.json:
        print(json.dumps(document, indent=1))
    else:
        _show(document)


def memory_document(
    model: Architecture, precisions: Sequence[Precision], workload: Workload, cards: Sequence[Card]
) -> dict[str, Any]:
    """Everything that the command shows, as plain JSON; all sizes in bytes.

    ``precisions`` holds for each its ``parts`` at the ``peak``, the ``stage`` it comes in, the peak of all
    ``stages``, ``needed`` of a card, the ``smallest_card`` that fits, and by card whether it ``fits`` and the
    ``largest`` batch and length. Where one card is given, the plan is for that card.
    """
    from rlquant.llm.cards import CONTEXT, FRAGMENTATION

    return {
        "schema": SCHEMA,
        "model": {**asdict(model), "parameters": model.parameters},
        "workload": {**asdict(workload), "completion": workload.generated},
        "context": CONTEXT,
        "fragmentation": FRAGMENTATION,
        "cards": [{"name": card.name, "bytes": card.bytes, "usable": card.usable} for card in cards],
        "precisions": [_of_precision(model, precision, workload, cards) for precision in precisions],
    }


def _of_precision(
    model: Architecture, precision: Precision, workload: Workload, cards: Sequence[Card]
) -> dict[str, Any]:
    from rlquant.llm.fitting import fits, largest
    from rlquant.llm.memory import plan_memory

    plan = plan_memory(model, precision, workload, cards[0] if len(cards) == 1 else None)
    fitting = {card.name: fits(plan_memory(model, precision, workload, card), card) for card in cards}
    smallest = min((card for card in cards if fitting[card.name]), key=lambda card: card.bytes, default=None)
    return {
        **_numbers(plan),
        "smallest_card": smallest.name if smallest else None,
        "fits": fitting,
        "largest": {
            card.name: {
                "batch": largest(model, precision, workload, card, "batch"),
                "seq": largest(model, precision, workload, card, "seq"),
            }
            for card in cards
        },
    }


def _numbers(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "precision": plan.precision.name,
        "parts": plan.parts,
        "peak": plan.peak,
        "needed": plan.needed,
        "stage": plan.stage,
        "stages": plan.stages,
        "embedding": plan.precision.weights(plan.model).tables,
    }


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    from rlquant.report.memory import cards_table, memory_lines, plans_table

    console = Console(highlight=False)
    model, work = document["model"], document["workload"]
    what = f"{work['batch']:,} x {work['seq']:,} tokens"
    console.print(
        f"{model['name']}: {model['parameters'] / 1e6:,.0f} M weights; {work['task']}, {what}\n",
        soft_wrap=True,
    )
    console.print(plans_table(document["precisions"]))
    console.print()
    console.print(cards_table(document["precisions"], document["cards"]))
    console.print()
    for line in memory_lines(document):
        console.print(line, soft_wrap=True)
