"""Calibration: run data through a float module and collect what its layers see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.quant.affine import QParams
from rlquant.quant.observers import Observer
from rlquant.quant.recurrent import run_float_layers
from rlquant.quant.scheme import Scheme

__all__ = [
    "Calibration",
    "InputStatistic",
    "Pass",
    "RangeStatistic",
    "eval_mode",
    "run_calibration",
    "run_passes",
]

Calibration = Iterable[Any] | Tensor


class InputStatistic(Protocol):
    """What a method gathers from the inputs of one layer, such as ranges or ``X^T X``."""

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Take in the arguments of one forward call of the layer."""


class RangeStatistic:
    """Observers for the activations of one layer, named as its static quantizers are."""

    def __init__(self, name: str, layer: nn.Module, scheme: Scheme) -> None:
        assert scheme.activations is not None
        self.name, self.layer = name, layer
        if isinstance(layer, nn.LSTM | nn.GRU):
            keys = [f"{part}_quant_l{k}" for k in range(layer.num_layers) for part in ("input", "hidden")]
        else:
            keys = ["input_quant"]
        self.observers = {key: Observer(scheme.activations, scheme.activation_observer) for key in keys}

    def observe(self, x: Tensor, hx: Any = None) -> None:
        """Observe the input of a layer; for recurrent layers also the hidden states."""
        seen = [x]
        if isinstance(self.layer, nn.LSTM | nn.GRU):
            seen = [part for pair in run_float_layers(self.layer, x, hx) for part in pair]
        for observer, part in zip(self.observers.values(), seen, strict=True):
            observer.observe(part, f"the calibration input of layer {self.name!r}")

    def qparams(self) -> dict[str, QParams]:
        """The chosen qparams by quantizer name. Raises InputError where no data reached the layer."""
        if any(observer.count == 0 for observer in self.observers.values()):
            raise InputError(
                f"calibration never reached layer {self.name!r}, so its activation range is unknown: "
                "name it in skip, or calibrate with data that uses it"
            )
        return {key: observer.qparams() for key, observer in self.observers.items()}


@dataclass(frozen=True)
class Pass:
    """What one run of a batch is for: statistics to feed, by the name of the layer whose input they observe;
    and
    layers whose output a stand-in gives instead, called with the same arguments."""

    statistics: Mapping[str, list[InputStatistic]]
    stand_ins: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def run_calibration(
    module: nn.Module,
    calibration: Calibration,
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, list[InputStatistic]],
) -> None:
    """Run the batches through ``module`` in eval mode without gradients and feed the layers' statistics.

    A tuple is the positional arguments of one call; anything else is the only argument; a bare tensor is one
    batch. Raises InputError where there is no batch.
    """
    run_passes(module, calibration, layers, [Pass(statistics)])


def run_passes(
    module: nn.Module,
    calibration: Calibration,
    layers: Mapping[str, nn.Module],
    passes: Sequence[Pass],
    enough: Callable[[], bool] | None = None,
) -> None:
    """Run every batch once for each pass, one pass after the other; else as :func:`run_calibration`.

    ``enough`` is asked after each batch whether the rest can be left out.
    """
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    count = 0
    with torch.no_grad(), eval_mode(module):
        for batch in batches:
            for each in passes:
                with _hooks(layers, each):
                    module(*batch) if isinstance(batch, tuple) else module(batch)
            count += 1
            if enough is not None and enough():
                break
    if count == 0:
        raise InputError("calibration holds no batch: give at least one input of the module")


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], each: Pass) -> Iterator[None]:
    with ExitStack() as stack:
        for name, layer in layers.items():
            if name in each.statistics:
                feed = layer.register_forward_pre_hook(_feed(each.statistics[name]), with_kwargs=True)
                stack.callback(feed.remove)
            if name in each.stand_ins:
                swap = layer.register_forward_hook(_stand_in(each.stand_ins[name]), with_kwargs=True)
                stack.callback(swap.remove)
        yield


def _feed(statistics: list[InputStatistic]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positional, named = _arguments(args, kwargs)
        for statistic in statistics:
            statistic.observe(*positional, **named)

    return hook


def _stand_in(
    instead: Callable[..., Any],
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        positional, named = _arguments(args, kwargs)
        return instead(*positional, **named)

    return hook


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The input in the first place: nn.Linear, nn.Conv2d and the recurrent layers call it ``input``."""
    if "input" not in kwargs:
        return args, kwargs
    return (kwargs["input"], *args), {key: value for key, value in kwargs.items() if key != "input"}


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for every part, and each part's own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
