"""Quantization-aware training: ``prepare_qat_`` before it, ``convert_`` after it.

A layer in training is the quantized layer itself (``QuantLinear``, ``QuantLSTM`` ...) with trainable parts
where the stored ones will be: :class:`LearnedWeight` for packed codes, :class:`LearnedActivation` for static
ranges, parameters for biases. Training and deployment thus run the same forward code, and :func:`convert_`
changes no output by a single bit.

>>> import torch
>>> from rlquant.quant import convert_, prepare_qat_
>>> net = prepare_qat_(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), "w2a4")
>>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
>>> net(torch.randn(16, 4)).square().mean().backward()
>>> optimizer.step()
>>> before = net(torch.ones(1, 4))
>>> bool((convert_(net)(torch.ones(1, 4)) == before).all())
True
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from torch import nn

from rlquant.errors import InputError
from rlquant.quant.activations import DynamicQuantizer, StaticQuantizer
from rlquant.quant.calibrate import Calibration, RangeStatistic, run_calibration
from rlquant.quant.kinds import empty_layer
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.lsq import LearnedActivation, LearnedWeight, RowWiseActivation
from rlquant.quant.ptq import as_scheme, layer_schemes, replace_layers
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import QuantizedWeight

__all__ = ["QATController", "convert_", "grid_parameters", "prepare_qat_"]

Learned = LearnedWeight | LearnedActivation | RowWiseActivation


def prepare_qat_(
    module: nn.Module,
    scheme: str | Scheme,
    *,
    calibration: Calibration | None = None,
    skip: Collection[str] = (),
    schemes: Mapping[str, str | Scheme] | None = None,
    observer: str | None = None,
) -> nn.Module:
    """Make ``module`` trainable on the grid of ``scheme``, in place; its float parameters stay the same objects.

    Args:
        module: as for :func:`~rlquant.quant.quantize_`. Every chosen layer is trained, whether its parameters
            required a gradient before or not.
        scheme: integer weights of 2 to 16 bits; activations static, dynamic or left in float.
        calibration: inputs from which static activation ranges start, as for ``quantize_``; without it they
            start from the first batches of the training (see :class:`QATController`).
        skip, schemes: layers to leave alone, and schemes of single layers, as for ``quantize_``.
        observer: the rule that chooses the first ranges, of weights and activations alike; by default the
            scheme's own rules. ``mse`` is a good start below 5 bits.

    Returns:
        The module (its replacement, where it is itself such a layer), in its own train or eval mode.

    Raises:
        InputError: as ``quantize_``, and for a scheme whose weights are no integers. The module is then
            unchanged.
    """
    by_layer = layer_schemes(module, as_scheme(scheme), skip, schemes)
    for each in by_layer.values() or [as_scheme(scheme)]:
        if each.weights.kind != "int":
            raise InputError(
                f"quantization-aware training learns integer grids, and {each.name} has none: "
                f"take int{max(2, min(each.weights.bits, 16))} or a wXaY scheme"
            )
        if each.double:
            raise InputError(f"scales in 8 bits cannot be learned: take {replace(each, double=False).name}")
    layers = {name: module.get_submodule(name) for name in by_layer}
    ranges = _observed(module, layers, by_layer, calibration, observer)

    def make(name: str) -> QuantizedLayer:
        each = by_layer[name]
        layer = _trainable(name or type(module).__name__, layers[name], each, observer or each.observer)
        if name in ranges:
            for key, qparams in ranges[name].qparams().items():
                layer.get_submodule(key).set(qparams)  # type: ignore[operator]
        return layer

    return replace_layers(module, layers, make)


def convert_(module: nn.Module) -> nn.Module:
    """Replace every trainable part by the stored one, in place: the layers of ``quantize_``, equal to the bit.

    Raises:
        InputError: nothing was prepared, a weight became NaN or Inf, or an activation range was never chosen
            because no batch has passed. The module is then unchanged.
    """
    prepared = {name: layer for name, layer in module.named_modules() if _is_prepared(layer)}
    if not prepared:
        raise InputError(f"{type(module).__name__} has no layer in training: call prepare_qat_ first")
    stored: list[tuple[nn.Module, str, nn.Module]] = []
    for name, layer in prepared.items():
        for key, part in layer.named_children():
            if isinstance(part, LearnedActivation) and not part.calibrated:
                raise InputError(
                    f"layer {name!r} never saw a batch, so its activation range is unknown: train it, or "
                    "give prepare_qat_ calibration data"
                )
            if isinstance(part, Learned):
                stored.append((layer, key, part.stored()))
    for layer, key, part in stored:
        setattr(layer, key, part)
    for layer in prepared.values():
        for key, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, key)
            layer.register_buffer(key, parameter.detach().clone())
    return module


def grid_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The learned scales and zero points, for an optimiser group with a learning rate of their own."""
    return [p for part in _parts(module) for p in part.parameters(recurse=False) if p is not _weight(part)]


class QATController:
    """Quantization delay and observer freeze, counted in training steps.

    For the first ``delay`` steps the network trains in float while its activation ranges are observed; then
    weights and activations snap to grids chosen from what was seen. ``freeze_after`` steps later (None:
    never) the grids stop learning, so that the last steps fine-tune the weights alone (Jacob et al. 2018,
    arXiv:1712.05877, section 3.1, delay activation quantization for the same reason).

    Args:
        module: prepared by :func:`prepare_qat_`.
        delay: steps in float; 0 starts quantized.
        freeze_after: steps from the end of the delay to the freeze.

    Raises:
        InputError: a negative number, or a module that was not prepared.
    """

    def __init__(self, module: nn.Module, *, delay: int = 0, freeze_after: int | None = None) -> None:
        if delay < 0 or (freeze_after is not None and freeze_after < 0):
            raise InputError(f"delay ({delay}) and freeze_after ({freeze_after}) count steps: 0 or more")
        if not list(_parts(module)):
            raise InputError(f"{type(module).__name__} has no layer in training: call prepare_qat_ first")
        self.module = module
        self.delay, self.freeze_after = delay, freeze_after
        self.steps = 0
        if delay:
            self.observe()

    def step(self, steps: int = 1) -> None:
        """Call once after each training step (or with how many were made)."""
        before, self.steps = self.steps, self.steps + steps
        if before < self.delay <= self.steps:
            self.quantize()
        freeze_at = None if self.freeze_after is None else self.delay + self.freeze_after
        if freeze_at is not None and before < freeze_at <= self.steps:
            self.freeze()

    def observe(self) -> None:
        """Run in float and watch the activations."""
        for part in _parts(self.module):
            part.quantizing = False

    def quantize(self) -> None:
        """Snap to grids: weights to those of their present values, activations to the ranges seen."""
        for part in _parts(self.module):
            if isinstance(part, LearnedWeight):
                part.reset_grid()
            elif isinstance(part, LearnedActivation):
                part.start_from_seen()
            part.quantizing = True

    def freeze(self) -> None:
        """Stop learning scales and zero points."""
        for part in _parts(self.module):
            part.freeze()


def _observed(
    module: nn.Module,
    layers: dict[str, nn.Module],
    by_layer: dict[str, Scheme],
    calibration: Calibration | None,
    observer: str | None,
) -> dict[str, RangeStatistic]:
    """Ranges of static activations, from calibration data where there is any."""
    ranges = {}
    for name, scheme in by_layer.items() if calibration is not None else ():
        if scheme.needs_calibration:
            start = scheme if observer is None else replace(scheme, activation_observer=observer)
            ranges[name] = RangeStatistic(name, layers[name], start)
    if ranges:
        assert calibration is not None
        seen = {name: layers[name] for name in ranges}
        run_calibration(module, calibration, seen, {name: [ranges[name]] for name in ranges})
    return ranges


def _parts(module: nn.Module) -> Iterator[Learned]:
    return (part for part in module.modules() if isinstance(part, Learned))


def _weight(part: Learned) -> nn.Parameter | None:
    return part.weight if isinstance(part, LearnedWeight) else None


def _is_prepared(layer: nn.Module) -> bool:
    return isinstance(layer, QuantizedLayer) and any(isinstance(part, Learned) for part in layer.children())


def _trainable(name: str, layer: nn.Module, scheme: Scheme, observer: str) -> QuantizedLayer:
    """The quantized layer with trainable parts; the float layer's parameters are kept as they are."""
    twin = empty_layer(layer, scheme)
    for key, part in list(twin.named_children()):
        if isinstance(part, QuantizedWeight):
            label = key.replace("packed", "weight")
            weight: nn.Parameter = getattr(layer, label)
            weight.requires_grad_(True)
            setattr(twin, key, LearnedWeight(weight, scheme, observer, f"{label} of layer {name!r}"))
        elif isinstance(part, StaticQuantizer):
            learned = LearnedActivation(part.fmt, getattr(twin, "input_dims", 1))
            setattr(twin, key, learned.to(part.scale.device))
        elif isinstance(part, DynamicQuantizer):
            setattr(twin, key, RowWiseActivation(part))
    for key, _ in list(twin.named_buffers(recurse=False)):
        delattr(twin, key)
        twin.register_parameter(key, getattr(layer, key).requires_grad_(True))
    return twin
