"""The network that chooses actions inside a live SB3 policy, seen as an :class:`Actor` over the same layers.

What is swapped in the Actor can be written back into the policy, so that everything that works on an Actor -
folding observation ranges, preparing, converting - works on a policy in training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import Tensor, nn

from rlquant.control.actor import Actor, FeatureMap
from rlquant.control.input_bits import apply_scheme_
from rlquant.control.quantize import OBSERVATION_HEADROOM, fold_features_
from rlquant.control.student import standard_range
from rlquant.errors import InputError
from rlquant.quant import MixedScheme, convert_, grid_parameters, prepare_qat_
from rlquant.quant.lsq import LearnedActivation, LearnedWeight

__all__ = ["LAYOUTS", "ActingNetwork", "Layout"]

_Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class Layout:
    """Where an algorithm's policy keeps what acts: for each network its extractor, then its other parts.

    A second network is the target of the first and follows its parameters.
    """

    networks: tuple[tuple[str, ...], ...]
    optimizer: str = "optimizer"

    def acting(self, policy: nn.Module) -> list[ActingNetwork]:
        """The acting networks of a policy."""
        return [ActingNetwork(policy, names) for names in self.networks]

    def optimizer_of(self, policy: Any) -> torch.optim.Optimizer:
        """The optimiser that trains the first network."""
        owner = policy
        for name in self.optimizer.split("."):
            owner = getattr(owner, name)
        optimizer: torch.optim.Optimizer = owner
        return optimizer


_ON_POLICY = Layout((("pi_features_extractor", "mlp_extractor.policy_net", "action_net"),))
_GAUSSIAN = Layout((("actor.features_extractor", "actor.latent_pi", "actor.mu"),), "actor.optimizer")
_DETERMINISTIC = Layout(
    (("actor.features_extractor", "actor.mu"), ("actor_target.features_extractor", "actor_target.mu")),
    "actor.optimizer",
)
_VALUES = Layout(
    (
        ("q_net.features_extractor", "q_net.q_net"),
        ("q_net_target.features_extractor", "q_net_target.q_net"),
    )
)
LAYOUTS = {
    "A2C": _ON_POLICY,
    "PPO": _ON_POLICY,
    "DQN": _VALUES,
    "SAC": _GAUSSIAN,
    "TQC": _GAUSSIAN,
    "TD3": _DETERMINISTIC,
    "DDPG": _DETERMINISTIC,
}
"""By SB3's class name."""


class ActingNetwork:
    """One network of a policy.

    Args:
        policy: an SB3 policy, quantized or not.
        names: of its features extractor and its further parts, in the order of the forward pass.

    Attributes:
        actor: its layers, the very objects of the policy.

    Raises:
        InputError: a policy, or a features extractor, that is not SB3's own for vectors or images.
    """

    def __init__(self, policy: nn.Module, names: tuple[str, ...]) -> None:
        try:
            self._encoder = list(_extractor_layers(policy.get_submodule(names[0])))
            self._trunk = [place for name in names[1:] for place in _leaves(policy, name)]
        except (AttributeError, KeyError):
            raise InputError(
                f"training quantized inside SB3 takes SB3's own policies; {type(policy).__name__} has not all of "
                f"{', '.join(names)}. Distil the trained agent instead"
            ) from None
        encoder = [parent._modules[key] for parent, key in self._encoder]
        trunk = [parent._modules[key] for parent, key in self._trunk]
        if isinstance(trunk[0], FeatureMap):
            self._trunk.pop(0)
            encoder.append(trunk.pop(0))
        self.actor = Actor({"": nn.Sequential(*encoder)}, nn.Sequential(*trunk))  # type: ignore[arg-type]

    def check(self, scheme: MixedScheme) -> None:
        """Raise what :meth:`prepare` would raise; changes nothing."""
        _make_trainable(copy.deepcopy(self.actor), scheme, None, "minmax")

    def prepare(self, scheme: MixedScheme, inputs: Tensor | None, observer: str) -> list[nn.Parameter]:
        """Make the network trainable under ``scheme``, in the policy.

        Args:
            scheme: see :func:`~rlquant.quant.prepare_qat_`.
            inputs: observations as the network sees them, from which ranges start; None where a checkpoint
                will bring the ranges.
            observer: the rule that chooses the first ranges.

        Returns:
            The new parameters: scales and zero points.
        """
        first = self.actor.trunk[0]  # type: ignore[index]
        if len(self._encoder) == 1 and isinstance(first, nn.Linear):  # a vector, flattened
            seen = torch.zeros(1, first.in_features) if inputs is None else inputs
            fold_features_(self.actor, {"": seen.to(first.weight.device)}, standard_range)
        _make_trainable(self.actor, scheme, inputs, observer)
        if inputs is not None:
            self._cover(inputs)
        self._write_back()
        return grid_parameters(self.actor)

    @torch.no_grad()
    def follow(self, inputs: Tensor) -> bool:
        """Choose the observation map anew where ``inputs`` have left its grid; whether they had.

        The first layer absorbs the change, exactly in real arithmetic, and chooses its grid anew too.
        """
        grid, feature_map, layer = self._grid(), self.actor.encoder("")[-1], self.actor.trunk[0]  # type: ignore[index]
        if grid is None or not isinstance(feature_map, FeatureMap):
            return False
        mapped = feature_map(inputs.flatten(1))
        if grid.low <= mapped.min() and mapped.max() <= grid.high:
            return False
        weight: LearnedWeight = layer.packed
        low, span = standard_range(mapped)
        span = torch.where(span > 0, span, torch.ones_like(span))
        layer.bias += weight.weight @ low
        weight.weight.mul_(span)
        weight.reset_grid()
        feature_map.low += low / feature_map.inverse_span
        feature_map.inverse_span /= span
        self._cover(inputs)
        return True

    def _grid(self) -> LearnedActivation | None:
        """The grid of the mapped observations; None where the scheme or the network has none."""
        grid = getattr(self.actor.trunk[0], "input_quant", None)  # type: ignore[index]
        return grid if isinstance(grid, LearnedActivation) else None

    @torch.no_grad()
    def _cover(self, inputs: Tensor) -> None:
        """Let the grid of the mapped observations cover ``inputs`` with some headroom; it remembers how far."""
        grid, feature_map = self._grid(), self.actor.encoder("")[-1]  # type: ignore[index]
        if grid is None or not isinstance(feature_map, FeatureMap):
            return
        low, high = torch.aminmax(feature_map(inputs.flatten(1)))
        margin = OBSERVATION_HEADROOM * (high - low)
        grid.low.copy_(low - margin)
        grid.high.copy_(high + margin)
        grid.start_from_seen()

    def stored(self) -> Actor:
        """A deployable copy, on the CPU: packed weights, the same outputs."""
        actor = convert_(copy.deepcopy(self.actor).cpu())
        assert isinstance(actor, Actor)
        return actor.eval().requires_grad_(False)

    def _write_back(self) -> None:
        """Put the Actor's layers into the policy."""
        encoder, trunk = [*self.actor.encoder("").children()], [*self.actor.trunk.children()]
        if isinstance(encoder[-1], FeatureMap):
            trunk[0] = nn.Sequential(encoder.pop(), trunk[0])
        for (parent, key), layer in zip(self._encoder + self._trunk, encoder + trunk, strict=True):
            parent._modules[key] = layer


def _make_trainable(actor: Actor, scheme: MixedScheme, inputs: Tensor | None, observer: str) -> None:
    calibration = None if inputs is None else [({"": inputs},)]
    apply_scheme_(
        actor,
        scheme,
        lambda module, base, schemes: prepare_qat_(
            module, base, calibration=calibration, schemes=schemes, observer=observer
        ),
    )


def _extractor_layers(extractor: nn.Module) -> Iterator[_Place]:
    if isinstance(extractor, FlattenExtractor):
        yield extractor, "flatten"
    elif isinstance(extractor, NatureCNN):
        yield from _leaves(extractor, "cnn")
        yield from _leaves(extractor, "linear")
    else:
        raise InputError(
            f"training quantized inside SB3 takes its FlattenExtractor or NatureCNN, not {type(extractor).__name__}; "
            "distil the trained agent instead"
        )


def _leaves(owner: nn.Module, name: str) -> Iterator[_Place]:
    """The layers of a submodule, those of nested Sequentials one by one, as (parent, key)."""
    *path, key = name.split(".")
    parent = owner.get_submodule(".".join(path))
    module = parent._modules[key]
    if isinstance(module, nn.Sequential):
        for child in module._modules:
            yield from _leaves(module, child)
    else:
        yield parent, key
