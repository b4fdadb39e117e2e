"""The registry of post-training methods and how their names combine.

A method name is one part or several joined by ``+``, such as ``cle+gptq+bias``. Parts are of three kinds:

- a **transform** rewrites the float layers exactly, before anything is rounded;
- a **rule** chooses the codes of one weight matrix; there is one, ``rtn`` where none is named;
- a **finisher** adjusts the finished layer.

A new part is one small file with its mathematics and a line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from rlquant.errors import InputError, unknown_name
from rlquant.quant.affine import QParams
from rlquant.quant.awq import awq
from rlquant.quant.bench import Bench
from rlquant.quant.bias import correct_bias_
from rlquant.quant.cle import cle
from rlquant.quant.clip import clip
from rlquant.quant.gptq import gptq
from rlquant.quant.hqq import hqq
from rlquant.quant.kinds import MatrixNames
from rlquant.quant.layers import QuantizedLayer
from rlquant.quant.moments import SAMPLE_ROWS, InputMoments
from rlquant.quant.nearest import round_to_nearest, round_with_best_range
from rlquant.quant.outlier import split_outliers
from rlquant.quant.scheme import Scheme
from rlquant.quant.smoothquant import smoothquant

__all__ = ["METHODS", "Finisher", "Method", "Rule", "Transform", "get_method"]


def any_scheme(scheme: Scheme) -> bool:
    """Every scheme will do."""
    return True


def has_scales(scheme: Scheme) -> bool:
    """The weights have scales, unlike plain casts to fp16 and bf16."""
    return scheme.stored.is_scaled


def has_activations(scheme: Scheme) -> bool:
    """Weights have scales and activations are quantized."""
    return scheme.stored.is_scaled and scheme.activations is not None


@dataclass(frozen=True)
class Transform:
    """``apply`` rewrites the float layers on a bench; ``rule`` chooses codes where no rule is named."""

    apply: Callable[[Bench], None]
    rule: str = "rtn"
    needs_inputs: bool = True
    can: Callable[[Scheme], bool] = has_scales


@dataclass(frozen=True)
class Rule:
    """``choose`` maps a float32 matrix ``[rows, columns]``, the scheme, the moments of its inputs (None where
    it reads none) and a name for messages to codes of its shape and qparams.

    ``gram`` and ``sample`` say what the moments must hold. ``finisher`` always follows in layers that have a
    bias.
    """

    choose: Callable[[Tensor, Scheme, InputMoments | None, str], tuple[Tensor, QParams | None]]
    gram: bool = False
    sample: int = 0
    finisher: str | None = None
    can: Callable[[Scheme], bool] = any_scheme

    @property
    def needs_inputs(self) -> bool:
        """Whether it reads the inputs of a layer."""
        return self.gram or self.sample > 0


@dataclass(frozen=True)
class Finisher:
    """``apply`` changes a finished layer: (layer, matrix names, float weight, moments of the inputs).

    ``absorbs_means`` says that the mean of an output error does not matter, since it is given back.
    """

    apply: Callable[[QuantizedLayer, MatrixNames, Tensor, InputMoments], None]
    absorbs_means: bool = False
    needs_inputs: bool = True
    can: Callable[[Scheme], bool] = any_scheme


Part = Transform | Rule | Finisher

METHODS: dict[str, Part] = {
    "rtn": Rule(round_to_nearest),
    "mse": Rule(round_with_best_range, can=has_scales),
    "clip": Rule(clip, sample=SAMPLE_ROWS, can=has_scales),
    "hqq": Rule(hqq, can=has_scales),
    "gptq": Rule(gptq, gram=True, finisher="bias"),
    "cle": Transform(cle, needs_inputs=False, can=any_scheme),
    "smoothquant": Transform(smoothquant, can=has_activations),
    "awq": Transform(awq, rule="clip"),
    "outlier": Transform(split_outliers),
    "bias": Finisher(correct_bias_, absorbs_means=True),
}


@dataclass(frozen=True)
class Method:
    """A combination of parts, in the order in which they act."""

    name: str
    transforms: tuple[Transform, ...]
    rule: Rule
    finishers: tuple[Finisher, ...]
    parts: tuple[str, ...]

    @property
    def needs_calibration(self) -> bool:
        """Whether it needs inputs of the module, whatever the scheme."""
        parts: tuple[Part, ...] = (*self.transforms, self.rule, *self.finishers)
        return any(part.needs_inputs for part in parts)

    def finishers_for(self, layer: nn.Module) -> tuple[Finisher, ...]:
        """The finishers of a layer: those named, or else the rule's own where the layer has a bias."""
        own = METHODS.get(self.rule.finisher or "")
        bias = getattr(layer, "bias", None)
        has_bias = bias is not None and bias is not False  # recurrent layers have a flag there
        return (own,) if isinstance(own, Finisher) and has_bias and not self.finishers else self.finishers

    def check(self, scheme: Scheme) -> None:
        """Raise InputError, naming the methods that can, where some part cannot do the scheme."""
        for name in self.parts:
            if not METHODS[name].can(scheme):
                can = [other for other, part in METHODS.items() if part.can(scheme)]
                raise InputError(f"method {name!r} cannot do {scheme.name}; these can: {', '.join(can)}")


def get_method(name: str) -> Method:
    """The method called ``name``. Raises InputError that lists the parts, or says which do not combine."""
    parts = tuple(name.split("+"))
    for part in parts:
        if part not in METHODS:
            raise unknown_name("method", part, METHODS)
    if len(set(parts)) < len(parts):
        raise InputError(f"method {name!r} names a part twice")
    rules = [part for part in parts if isinstance(METHODS[part], Rule)]
    if len(rules) > 1:
        raise InputError(
            f"method {name!r} has several rules for choosing codes: keep one of {', '.join(rules)}"
        )
    transforms = _of(Transform, parts)
    rule = rules[0] if rules else next((each.rule for each in transforms if each.rule != "rtn"), "rtn")
    chosen = METHODS[rule]
    assert isinstance(chosen, Rule)
    return Method(name, transforms, chosen, _of(Finisher, parts), parts)


P = TypeVar("P", Transform, Finisher)


def _of(kind: type[P], parts: tuple[str, ...]) -> tuple[P, ...]:
    return tuple(part for part in map(METHODS.__getitem__, parts) if isinstance(part, kind))
