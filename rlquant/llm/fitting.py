"""What fits on a card: the largest batch and length, and the error where a workload does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from rlquant.errors import InputError
from rlquant.llm.architecture import Architecture
from rlquant.llm.cards import Card
from rlquant.llm.memory import MemoryPlan, Workload, plan_memory
from rlquant.llm.precision import Precision

__all__ = ["Knob", "fits", "largest", "require_fit"]

Knob = Literal["batch", "seq", "rollout"]
_MOST = 2**20
_OPTIONS: Mapping[Knob, str] = {"batch": "--batch ", "seq": "--seq "}


def fits(plan: MemoryPlan, card: Card) -> bool:
    """Whether a plan that was made for this card fits on it."""
    return plan.peak <= card.usable


def largest(
    model: Architecture,
    precision: Precision,
    workload: Workload,
    card: Card,
    knob: Knob,
) -> int:
    """The largest batch or rollout, or the largest length up to what the model was made for, that fits; 0 for none."""
    low, high = 0, model.longest if knob == "seq" else _MOST
    while low < high:
        middle = (low + high + 1) // 2
        fitting = fits(plan_memory(model, precision, _of_size(workload, knob, middle), card), card)
        low, high = (middle, high) if fitting else (low, middle - 1)
    return low


def _of_size(workload: Workload, knob: Knob, size: int) -> Workload:
    """The same in another size; of another length, the completion keeps its share."""
    if knob == "batch":
        return replace(workload, batch=size)
    if knob == "rollout":
        return replace(workload, rollout=size)
    completion = workload.completion
    if completion is not None:
        completion = max(completion * size // workload.seq, 1)
    return replace(workload, seq=size, completion=completion)


def require_fit(plan: MemoryPlan, card: Card, knobs: Mapping[Knob, str] = _OPTIONS) -> None:
    """Raises InputError with the plan's numbers and the largest settings that fit, where the plan does not.

    ``knobs`` are what stands before a batch, a length or a rollout that fit.
    """
    if fits(plan, card):
        return
    model, precision, workload = plan.model, plan.precision, plan.workload
    sizes = {knob: largest(model, precision, workload, card, knob) for knob in knobs}
    ways = [f"{knobs[knob]}{size}" for knob, size in sizes.items() if size]
    advice = f"this fits: {' or '.join(ways)}" if ways else "no batch and no length fits"
    raise InputError(
        f"{workload.task} of {model.name} in {precision.name} with {workload.batch} x {workload.seq} tokens needs "
        f"{plan.needed / 1e9:.1f} GB, and {card.name} has {card.bytes / 1e9:.1f} GB; {advice}"
    )
