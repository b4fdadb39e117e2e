"""Learning rates that vanish: a step smaller than half a unit in the last place of a weight changes nothing."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from rlquant.errors import InputError
from rlquant.llm.adapters import adapter_parameters

__all__ = ["check_learning_rate", "moving_share"]


def moving_share(model: nn.Module, name: str, learning_rate: float) -> float:
    """Share of an adapter's A matrices that a step of ``learning_rate`` changes in their dtype.

    Adam's steps are about as large as the learning rate; half a unit in the last place is lost to rounding.
    """
    moved = total = 0
    for key, parameter in adapter_parameters(model, name).items():
        if ".lora_A." in key:
            weight = parameter.detach()
            moved += int(((weight + learning_rate != weight) | (weight - learning_rate != weight)).sum())
            total += weight.numel()
    return moved / max(total, 1)


def check_learning_rate(model: nn.Module, name: str, learning_rate: float) -> None:
    """Warn of a learning rate at which some of an adapter cannot move.

    Raises:
        InputError: it is not positive, or most of the adapter cannot move.
    """
    if not learning_rate > 0:
        raise InputError(f"a learning rate is positive, not {learning_rate}")
    share = moving_share(model, name, learning_rate)
    dtype = next(iter(adapter_parameters(model, name).values())).dtype
    text = (
        f"at the learning rate {learning_rate:g}, steps of {1 - share:.0%} of the adapter {name!r} vanish in "
        f"{str(dtype).removeprefix('torch.')}"
    )
    way = "take a higher one" if dtype == torch.float32 else "keep adapters in float32, or take a higher one"
    if share < 0.5:
        raise InputError(f"{text}: {way}")
    if share < 0.99:
        warnings.warn(f"{text}: {way}", stacklevel=2)
