"""The student of a distillation: the teacher's network on a grid, ready to be trained and turned back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rlquant.control.actor import Actor, FeatureMap
from rlquant.control.agent import Agent
from rlquant.control.collect import Inputs
from rlquant.control.input_bits import apply_scheme_
from rlquant.control.quantize import fold_features_
from rlquant.quant import MixedScheme, center_head_, convert_, grid_parameters, prepare_qat_

__all__ = ["LearnedFeatureMap", "Student", "standard_range"]

SPAN_LIMIT = 16.0
"""A feature's unit is its standard deviation, or this fraction of its range where that is larger."""


class LearnedFeatureMap(nn.Module):
    """A :class:`FeatureMap` whose spans are learned.

    The first layer has few inputs and, at few bits, few values for each weight; all inputs of a unit share one
    scale. How large each feature enters therefore decides how finely it is weighed, and is worth learning: on
    HalfCheetah it is the difference between 2-bit weights that run and ones that fall.

    Parameter: ``log_gain``, float32 ``[features]``.
    """

    low: Tensor
    inverse_span: Tensor

    def __init__(self, start: FeatureMap) -> None:
        super().__init__()
        self.register_buffer("low", start.low)
        self.register_buffer("inverse_span", start.inverse_span)
        self.log_gain = nn.Parameter(torch.zeros_like(start.low))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, features]`` to the same shape."""
        return (x - self.low) * (self.inverse_span * self.log_gain.exp())

    @torch.no_grad()
    def stored(self) -> FeatureMap:
        """The map with the learned spans, equal to the bit."""
        stored = FeatureMap.empty(len(self.low)).to(self.low.device)
        stored.load_state_dict({"low": self.low, "inverse_span": self.inverse_span * self.log_gain.exp()})
        return stored


class Student:
    """A trainable copy of an agent's network under a scheme.

    Before anything is rounded, observations are standardised and the first layer absorbs the inverse; an
    argmax head is centred over its actions. Both are exact.

    Args:
        teacher: the fp32 agent.
        scheme: integer weights; see :func:`~rlquant.quant.prepare_qat_`.
        inputs: on-policy inputs of the teacher, from which all ranges start.
        observer: the rule that chooses the first ranges.

    Attributes:
        actor: the network in training.

    Raises:
        InputError: the scheme has no integer grid, or nothing can be quantized.
    """

    def __init__(self, teacher: Agent, scheme: MixedScheme, inputs: Inputs, *, observer: str = "mse") -> None:
        self.teacher, self.scheme = teacher, scheme
        self.actor = copy.deepcopy(teacher.actor)
        fold_features_(self.actor, inputs.parts, standard_range)
        last = [layer for layer in self.actor.modules() if isinstance(layer, nn.Linear)][-1:]
        if teacher.head.kind == "argmax" and last and last[0].out_features == teacher.head.outputs:
            center_head_(last[0])
        calibration = inputs.batches()
        apply_scheme_(
            self.actor,
            scheme,
            lambda module, base, schemes: prepare_qat_(
                module, base, calibration=calibration, schemes=schemes, observer=observer
            ),
        )
        _swap(self.actor, FeatureMap, LearnedFeatureMap)
        self.actor.train()

    def parameter_groups(self, lr: float, grid_lr: float, feature_lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimiser: weights and biases, scales and zero points, feature gains."""
        grids = grid_parameters(self.actor)
        gains = [m.log_gain for m in self.actor.modules() if isinstance(m, LearnedFeatureMap)]
        special = {id(parameter) for parameter in grids + gains}
        weights = [p for p in self.actor.parameters() if p.requires_grad and id(p) not in special]
        groups = ((weights, lr), (grids, grid_lr), (gains, feature_lr))
        return [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]

    def acting(self, method: str) -> Agent:
        """The agent as it would be deployed now: packed weights, outputs equal to :attr:`actor`'s to the bit."""
        actor = convert_(copy.deepcopy(self.actor))
        assert isinstance(actor, Actor)
        _swap(actor, LearnedFeatureMap, LearnedFeatureMap.stored)
        return self.teacher.with_actor(actor.eval().requires_grad_(False), self.scheme.name, method)


def standard_range(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unit of each feature, ``[features]`` each, for :func:`fold_features_`."""
    reach = (features.amax(0) - features.amin(0)) / SPAN_LIMIT
    return features.mean(0), torch.maximum(features.std(0, correction=0), reach)


def _swap(actor: Actor, kind: type[nn.Module], replace: Any) -> None:
    for key in actor.keys:
        encoder = actor.encoder(key)
        if isinstance(encoder, nn.Sequential) and len(encoder) and isinstance(encoder[-1], kind):
            encoder[-1] = replace(encoder[-1])
