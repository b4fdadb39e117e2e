"""From float layers to quantized ones, by a method: transforms, then layer after layer, then finishing
touches.

Layers are quantized in the order in which the module calls them, and each sees its inputs as the layers
already quantized before it make them ("true sequential", as in GPTQ): it makes up for their errors. Layers
that read the very same tensor, such as query, key and value projections, are one stage and share a pass of
the data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.quant.affine import QParams, finite_extremes
from rlquant.quant.bench import Bench, Twin
from rlquant.quant.calibrate import InputStatistic, RangeStatistic
from rlquant.quant.granularity import as_matrix
from rlquant.quant.kinds import empty_layer, matrices
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.methods import Method
from rlquant.quant.moments import InputMoments, LayerMoments
from rlquant.quant.nearest import round_to_nearest
from rlquant.quant.notes import CalibrationWarning
from rlquant.quant.scheme import Scheme
from rlquant.quant.tensor import QuantizedWeight, join_rows

__all__ = ["run_method"]


def run_method(bench: Bench, method: Method, *, sequential: bool = True) -> None:
    """Give every twin on the bench its quantized layer.

    Raises InputError, naming the layer where it is one layer's fault.
    """
    for scheme in {twin.scheme: None for twin in bench.twins.values()}:
        method.check(scheme)
    if method.needs_calibration:
        bench.keep_batches()
    for transform in method.transforms:
        transform.apply(bench)
    reads_inputs = method.rule.needs_inputs or bool(method.finishers)
    ranges, order = _float_pass(bench, reads_inputs)
    activations = {name: statistic.qparams() for name, statistic in ranges.items()}
    for stage in order.stages() if reads_inputs and sequential else [list(bench.twins)]:
        empty = {name: _empty(bench.twins[name], activations.get(name)) for name in stage}
        moments = _moments(bench, empty, method) if reads_inputs else {}
        for name, layer in empty.items():
            with _naming(bench.twins[name]):
                _load(bench.twins[name], layer, method, moments.get(name))
        for name, layer in empty.items():
            bench.twins[name].quantized = layer


class CallOrder:
    """In which order the layers of a module are called, and which of them are given the same tensor."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._first: dict[str, Any] = {}

    def statistic(self, name: str) -> _FirstInput:
        """What is to observe the inputs of a layer."""
        return _FirstInput(self._first, name)

    def is_complete(self) -> bool:
        """Whether every layer was called."""
        return len(self._first) == len(self.names)

    def stages(self) -> list[list[str]]:
        """Names in order of first call, neighbours that read the same tensor together; unused ones last."""
        stages: list[list[str]] = []
        last: Any = None
        for name, x in self._first.items():
            if stages and x is last:
                stages[-1].append(name)
            else:
                stages.append([name])
            last = x
        unused = [name for name in self.names if name not in self._first]
        return [*stages, unused] if unused else stages


class _FirstInput:
    def __init__(self, first: dict[str, Any], name: str) -> None:
        self.first, self.name = first, name

    def observe(self, x: Any, *args: Any, **kwargs: Any) -> None:
        self.first.setdefault(self.name, x)


def _float_pass(bench: Bench, reads_inputs: bool) -> tuple[dict[str, RangeStatistic], CallOrder]:
    """One pass of the float network: activation ranges and the order of calls, as needed."""
    order = CallOrder(list(bench.twins))
    ranges = {
        name: RangeStatistic(name, twin.layer, twin.scheme)
        for name, twin in bench.twins.items()
        if twin.scheme.needs_calibration
    }
    if ranges or reads_inputs:
        parts = (ranges, {name: order.statistic(name) for name in bench.twins})
        statistics: dict[str, list[InputStatistic]] = {
            name: [part[name] for part in parts if name in part] for name in bench.twins
        }
        bench.observe(statistics, enough=None if ranges else order.is_complete)
    return ranges, order


def _empty(twin: Twin, activations: dict[str, QParams] | None) -> QuantizedLayer:
    """The quantized layer of a twin with its activation grids, still without codes."""
    with _naming(twin):
        layer = empty_layer(twin.layer, twin.scheme)
    if activations:
        layer.set_activations(activations)
    return layer


def _moments(bench: Bench, empty: dict[str, QuantizedLayer], method: Method) -> dict[str, LayerMoments]:
    """Moments of what enters the layers of a stage, on their activation grids, in one pass."""
    rule, gathered = method.rule, {}
    for name, layer in empty.items():
        original = bench.twins[name].layer
        centered = any(finisher.absorbs_means for finisher in method.finishers_for(original))
        gathered[name] = LayerMoments(
            name, original, gram=rule.gram, centered=centered, sample=rule.sample, quantized=layer
        )
    bench.observe_beside_float(gathered)
    return gathered


def _load(twin: Twin, layer: QuantizedLayer, method: Method, moments: LayerMoments | None) -> None:
    """Choose the codes of every matrix, load them, and let the finishers adjust the layer."""
    packed = {}
    for names in matrices(twin.layer):
        weight = twin.weight(names)
        what = "the weight" if names.weight == "weight" else names.weight
        finite_extremes(weight, what)
        seen = None if moments is None else moments.by_matrix[names.packed]
        label = f"layer {twin.name!r}: {what}"
        codes, qparams = _choose(as_matrix(weight).to(torch.float32), layer.scheme, method, seen, label)
        packed[names.packed] = QuantizedWeight.from_codes(codes.view(weight.shape), qparams, layer.scheme)
    layer.load_float(twin.layer, packed)
    twin.load_extras(layer)
    if moments is None:
        return
    for names in matrices(twin.layer):
        seen = moments.by_matrix[names.packed]
        for finisher in method.finishers_for(twin.layer) if seen.count else ():
            finisher.apply(layer, names, twin.weight(names), seen)


def _choose(
    matrix: Tensor, scheme: Scheme, method: Method, moments: InputMoments | None, what: str
) -> tuple[Tensor, QParams | None]:
    """Codes and qparams of a whole matrix, whose blocks of rows may have inputs of their own."""
    rule = method.rule
    if not rule.needs_inputs:
        return rule.choose(matrix, scheme, None, what)
    assert moments is not None
    if moments.count == 0:
        warnings.warn(
            f"{what}: calibration never reached it, so it is rounded to nearest. Calibrate with data that uses it, "
            "or name it in skip",
            CalibrationWarning,
            stacklevel=2,
        )
        return round_to_nearest(matrix, scheme, None, what)
    if moments.blocks == 1:
        return rule.choose(matrix, scheme, moments, what)
    if scheme.granularity.kind == "tensor":
        raise InputError(
            "a Conv2d with groups has inputs of its own for each group, and one scale for the tensor cannot be chosen "
            "by each: take scales per channel, or the method rtn"
        )
    return join_rows(
        [
            rule.choose(part, scheme, moments.block(i), what)
            for i, part in enumerate(matrix.chunk(moments.blocks))
        ]
    )


@contextmanager
def _naming(twin: Twin) -> Iterator[None]:
    """Say in an InputError which layer it is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"layer {twin.name or type(twin.layer).__name__!r}: {error}") from error
