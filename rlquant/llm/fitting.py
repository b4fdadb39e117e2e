"""What fits on a card: the largest batch and length, and the error where a workload does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rlquant.errors import InputError
from rlquant.llm.architecture import Architecture
from rlquant.llm.cards import Card
from rlquant.llm.memory import MemoryPlan, Workload, plan_memory
from rlquant.llm.precision import Precision

__all__ = ["fits", "largest", "require_fit"]

_MOST = 2**20


def fits(plan: MemoryPlan, card: Card) -> bool:
    """Whether a plan that was made for this card fits on it."""
    return plan.peak <= card.usable


def largest(
    model: Architecture,
    precision: Precision,
    workload: Workload,
    card: Card,
    knob: Literal["batch", "seq"],
) -> int:
    """The largest batch, or the largest length up to what the model was made for, that fits; 0 where none does."""
    low, high = 0, _MOST if knob == "batch" else model.longest
    while low < high:
        middle = (low + high + 1) // 2
        changed = replace(workload, batch=middle) if knob == "batch" else _of_length(workload, middle)
        fitting = fits(plan_memory(model, precision, changed, card), card)
        low, high = (middle, high) if fitting else (low, middle - 1)
    return low


def _of_length(workload: Workload, seq: int) -> Workload:
    """The same with sequences of another length; the completion keeps its share of them."""
    completion = workload.completion
    if completion is not None:
        completion = max(completion * seq // workload.seq, 1)
    return replace(workload, seq=seq, completion=completion)


def require_fit(plan: MemoryPlan, card: Card, knobs: tuple[str, str] = ("--batch ", "--seq ")) -> None:
    """Raises InputError with the plan's numbers and the largest settings that fit, where the plan does not.

    ``knobs`` are what stands before a batch and before a length that fit.
    """
    if fits(plan, card):
        return
    model, precision, workload = plan.model, plan.precision, plan.workload
    batch = largest(model, precision, workload, card, "batch")
    seq = largest(model, precision, workload, card, "seq")
    ways = ([f"{knobs[0]}{batch}"] if batch else []) + ([f"{knobs[1]}{seq}"] if seq else [])
    advice = f"this fits: {' or '.join(ways)}" if ways else "no batch and no length fits"
    raise InputError(
        f"{workload.task} of {model.name} in {precision.name} with {workload.batch} x {workload.seq} tokens needs "
        f"{plan.needed / 1e9:.1f} GB, and {card.name} has {card.bytes / 1e9:.1f} GB; {advice}"
    )
