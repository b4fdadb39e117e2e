"""The bench on which methods work: a float module whose layers are exchanged one by one.

The module itself stays untouched. A :class:`Twin` stands in for each layer, by a hook that replaces the
layer's output: first as the float layer, then as a copy that a rewrite changed, at last as the quantized
layer. An error on the way therefore leaves nothing half done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlquant.quant.calibrate import Calibration, InputStatistic, Pass, run_passes
from rlquant.quant.kinds import MatrixNames
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.moments import LayerMoments
from rlquant.quant.rewrites import Link, channel_view, find_links, fold_scale_, scale_inputs_
from rlquant.quant.scheme import Scheme

__all__ = ["Bench", "Twin"]

_FP32 = Scheme.parse("fp32")


class Twin:
    """What stands for one layer.

    ``scheme`` says what it becomes, ``input_scale`` ``[channels]`` multiplies its input, ``outliers`` (int64
    ``[k]``) are input channels that stay in 16 bit, ``quantized`` is the finished layer.
    """

    def __init__(self, name: str, layer: nn.Module, scheme: Scheme) -> None:
        self.name, self.original, self.layer, self.scheme = name, layer, layer, scheme
        self.input_scale: Tensor | None = None
        self.outliers: Tensor | None = None
        self.quantized: QuantizedLayer | None = None

    @property
    def channels(self) -> int:
        """Input channels of a Linear or Conv2d."""
        assert isinstance(self.layer, nn.Linear | nn.Conv2d)
        return self.layer.in_features if isinstance(self.layer, nn.Linear) else self.layer.in_channels

    @property
    def channel_dim(self) -> int:
        """The dimension of its input that counts channels."""
        return -3 if isinstance(self.layer, nn.Conv2d) else -1

    @property
    def rescalable(self) -> bool:
        """Whether its input channels can be scaled or split off one by one."""
        grouped = isinstance(self.layer, nn.Conv2d) and self.layer.groups > 1
        return isinstance(self.layer, nn.Linear | nn.Conv2d) and not grouped

    def edit(self) -> nn.Module:
        """A copy of the float layer to change in place."""
        if self.layer is self.original:
            self.layer = copy.deepcopy(self.original)
        return self.layer

    def entering(self, x: Tensor, *, outliers: bool = False) -> Tensor:
        """The scaled input, without the outlier channels (or with them)."""
        if self.input_scale is not None:
            x = x * self.input_scale.view(-1, *(1,) * (-self.channel_dim - 1)).to(x.dtype)
        if self.outliers is not None and not outliers:
            x = x.index_fill(self.channel_dim, self.outliers, 0.0)
        return x

    def float_output(self, x: Tensor, *rest: Any) -> Any:
        """The output of the rewritten float layer."""
        return self.layer(self.entering(x, outliers=True), *rest)

    def __call__(self, x: Tensor, *rest: Any) -> Any:
        """The output of the quantized layer, or of the float one as long as there is none."""
        return self.float_output(x, *rest) if self.quantized is None else self.quantized(x, *rest)

    def weight(self, names: MatrixNames) -> Tensor:
        """The float weight that is rounded: outlier channels are zero in it."""
        weight = self.layer.get_parameter(names.weight).detach()
        return weight if self.outliers is None else weight.index_fill(1, self.outliers, 0.0)

    def load_extras(self, quantized: QuantizedLayer) -> None:
        """Hand the input scale and the outlier channels on to the quantized layer."""
        if self.input_scale is not None:
            quantized.input_scale = self.input_scale
        if self.outliers is not None:
            columns = self.layer.get_parameter("weight").detach().index_select(1, self.outliers)
            quantized.outlier_index = self.outliers.to(torch.int32)
            quantized.outlier_weight = columns.to(torch.float16)

    @property
    def rewritten(self) -> bool:
        """Whether the float layer is another than at first."""
        return self.layer is not self.original or self.input_scale is not None


class Bench:
    """A module, the layers of it that are being quantized, and calibration batches that can be run again."""

    def __init__(
        self,
        module: nn.Module,
        schemes: Mapping[str, Scheme],
        calibration: Calibration | None,
        links: Sequence[Link] | None = None,
    ) -> None:
        """``schemes`` names the layers and says what each becomes; ``links`` are found where None is given."""
        self.module, self.calibration = module, calibration
        self.twins = {name: Twin(name, module.get_submodule(name), each) for name, each in schemes.items()}
        self.norms: dict[str, Twin] = {}
        self.links = find_links(module, schemes) if links is None else [*links]

    @property
    def originals(self) -> dict[str, nn.Module]:
        """The layers of the module that have a twin, norms included."""
        return {name: twin.original for name, twin in self._all.items()}

    @property
    def _all(self) -> dict[str, Twin]:
        return {**self.twins, **self.norms}

    def finished(self, name: str) -> nn.Module:
        """What takes the place of a layer in the end: the quantized layer, or a rewritten norm."""
        twin = self.twins.get(name) or self.norms[name]
        return twin.quantized or twin.layer

    def keep_batches(self) -> None:
        """Make the calibration data readable more than once."""
        if self.calibration is not None and not isinstance(self.calibration, Tensor):
            self.calibration = list(self.calibration)

    def observe(
        self, statistics: Mapping[str, list[InputStatistic]], enough: Callable[[], bool] | None = None
    ) -> None:
        """One pass of the float network; each statistic sees what enters its layer, scaled and masked.

        It ends early once there is ``enough``.
        """
        assert self.calibration is not None
        run_passes(self.module, self.calibration, self.originals, [self._float_pass(statistics)], enough)

    def observe_beside_float(self, moments: Mapping[str, LayerMoments]) -> None:
        """One pass of the partly quantized network, each batch beside the same batch in the float network."""
        assert self.calibration is not None
        references: dict[str, list[InputStatistic]] = {
            name: [_Reference(part)] for name, part in moments.items()
        }
        statistics: dict[str, list[InputStatistic]] = {name: [part] for name, part in moments.items()}
        now = {name: twin for name, twin in self._all.items() if twin.rewritten or twin.quantized is not None}
        passes = [self._float_pass(references), Pass(self._entering(statistics), now)]
        nothing_quantized = all(twin.quantized is None for twin in self.twins.values())
        run_passes(self.module, self.calibration, self.originals, passes[1:] if nothing_quantized else passes)

    def _float_pass(self, statistics: Mapping[str, list[InputStatistic]]) -> Pass:
        rewritten = {name: twin.float_output for name, twin in self._all.items() if twin.rewritten}
        return Pass(self._entering(statistics), rewritten)

    def _entering(self, statistics: Mapping[str, list[InputStatistic]]) -> dict[str, list[InputStatistic]]:
        return {
            name: [_Entering(self.twins[name], part) for part in parts] for name, parts in statistics.items()
        }

    def moments(self, names: Iterable[str], *, sample: int = 0) -> dict[str, LayerMoments]:
        """Moments of what enters some layers in the float network, gathered in one pass."""
        gathered = {name: LayerMoments(name, self.twins[name].layer, sample=sample) for name in names}
        self.observe({name: [part] for name, part in gathered.items()})
        return gathered

    def consumer_groups(self) -> list[tuple[Link | None, list[Twin]]]:
        """The layers whose inputs can be scaled: consumers of a link together, every other one by itself."""
        groups: list[tuple[Link | None, list[Twin]]] = []
        links = {name: link for link in self.links for name in link.consumers}
        for name, twin in self.twins.items():
            link = links.get(name)
            if link is None and twin.rescalable:
                groups.append((None, [twin]))
            elif link is not None and name == link.consumers[0]:
                groups.append((link, [self.twins[each] for each in link.consumers]))
        return groups

    def channels(self, link: Link | None, twins: list[Twin]) -> int:
        """How many factors a group of :meth:`consumer_groups` takes."""
        return len(self._producer(link).layer.get_parameter("weight")) if link else twins[0].channels

    def scale(self, link: Link | None, twins: list[Twin], scale: Tensor) -> None:
        """Multiply the weights' input channels by ``scale`` and divide the input by it.

        The division is folded into the producer of a link; without one it stays in the layer as an explicit
        input scale, which is stored with it.
        """
        if link is not None:
            fold_scale_(self._producer(link).edit(), [twin.edit() for twin in twins], scale)
            return
        for twin in twins:
            scale_inputs_(twin.edit(), scale)
            inverse = (1.0 / scale.double()).to(torch.float32)
            twin.input_scale = inverse if twin.input_scale is None else twin.input_scale * inverse

    def weight_channels(self, twin: Twin, channels: int) -> Tensor:
        """The present float weight, ``[out, channels, columns of one channel]``."""
        return channel_view(twin.layer, channels)

    def _producer(self, link: Link) -> Twin:
        if link.producer in self.twins:
            return self.twins[link.producer]
        if link.producer not in self.norms:
            self.norms[link.producer] = Twin(link.producer, self.module.get_submodule(link.producer), _FP32)
        return self.norms[link.producer]


class _Entering:
    """Shows a statistic the input of a layer as its twin takes it."""

    def __init__(self, twin: Twin, statistic: InputStatistic) -> None:
        self.twin, self.statistic = twin, statistic

    def observe(self, x: Tensor, *args: Any, **kwargs: Any) -> None:
        self.statistic.observe(self.twin.entering(x), *args, **kwargs)


class _Reference:
    """Shows moments what enters the layer in the float network."""

    def __init__(self, moments: LayerMoments) -> None:
        self.moments = moments

    def observe(self, *args: Any, **kwargs: Any) -> None:
        self.moments.observe_reference(*args, **kwargs)
