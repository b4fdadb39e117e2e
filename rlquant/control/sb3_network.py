"""Builds the deployable network of an SB3 policy from its state dict.

The shapes come from the tensors, the activation function from the plain JSON of ``policy_kwargs``, the rest
from SB3's fixed designs: ``create_mlp``, ``NatureCNN`` (Mnih et al. 2015), ``CombinedExtractor``, an LSTM core.
Exact simplifications are made while building: QR-DQN's quantiles are averaged into one row per action (the
mean commutes with the linear layer), and TD3's final tanh becomes part of the head.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlquant.control.actor import ACTIVATIONS, Actor
from rlquant.control.head import Head
from rlquant.control.spaces import Space, flat_size
from rlquant.errors import InputError

__all__ = ["activation_class", "build_network", "example_inputs"]

_TENSORS = dict[str, Tensor]
_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)
_ACTOR_CRITIC = ("A2C", "PPO", "TRPO", "RecurrentPPO", "MaskablePPO")
# NatureCNN's fixed strides, by the index of its convolutions (kernel sizes are in the tensors).
_NATURE_STRIDES = {0: 4, 2: 2, 4: 1}


def build_network(
    algorithm: str, tensors: _TENSORS, policy_kwargs: dict[str, Any], observation: Space, action: Space
) -> tuple[Actor, Head]:
    """The network and head of an SB3 policy.

    Args:
        algorithm: SB3's class name.
        tensors: the policy's whole state dict.
        policy_kwargs: plain fields of the checkpoint's ``policy_kwargs``.
        observation: the space that the network sees (channel-first images, stacked frames).
        action: the action space.

    Raises:
        InputError: the state dict has no network of that algorithm, or a part that SB3 itself has not
            (a custom features extractor), or shapes that do not fit the spaces.
    """
    builder = _Builder(algorithm, dict(tensors), policy_kwargs, observation)
    if algorithm in _ACTOR_CRITIC:
        actor, kind = builder.actor_critic(), _actor_critic_head(action, policy_kwargs)
    elif algorithm in ("DQN", "QRDQN"):
        actor, kind = builder.value_network(action), "argmax"
    elif algorithm in ("SAC", "TQC"):
        actor, kind = builder.squashed_gaussian(), "tanh"
    elif algorithm in ("TD3", "DDPG"):
        actor, kind = builder.mlp_actor("actor.features_extractor", "actor.mu"), "tanh"
    else:
        actor = builder.mlp_actor("features_extractor", "action_net")
        kind = _ars_head(action, policy_kwargs)
    head = Head(kind, action)
    _check_sizes(actor, head, observation, algorithm)
    return actor.eval().requires_grad_(False), head


class _Builder:
    """Takes tensors out of a state dict by prefix and turns them into layers."""

    def __init__(self, algorithm: str, tensors: _TENSORS, kwargs: dict[str, Any], observation: Space) -> None:
        self.algorithm = algorithm
        self.tensors = tensors
        self.kwargs = kwargs
        self.observation = observation
        default = "Tanh" if algorithm in _ACTOR_CRITIC else "ReLU"
        self.activation = activation_class(kwargs, default)

    def actor_critic(self) -> Actor:
        """A2C, PPO, TRPO and their recurrent and masked kin."""
        prefix = "pi_features_extractor" if self._has("pi_features_extractor") else "features_extractor"
        layers = self._mlp("mlp_extractor.shared_net", end=True) + self._mlp(
            "mlp_extractor.policy_net", end=True
        )
        trunk = nn.Sequential(*layers, self._linear("action_net"))
        rnn = self._lstm("lstm_actor") if self._has("lstm_actor") else None
        return Actor(self._encoders(prefix), trunk, rnn)

    def value_network(self, action: Space) -> Actor:
        """DQN and QR-DQN: Q-values, one per action."""
        name = "q_net" if self.algorithm == "DQN" else "quantile_net"
        layers = self._mlp(f"{name}.{name}", end=False)
        if self.algorithm == "QRDQN":
            layers[-1] = _average_quantiles(layers[-1], action.sizes[0])
        return Actor(self._encoders(f"{name}.features_extractor"), nn.Sequential(*layers))

    def squashed_gaussian(self) -> Actor:
        """SAC and TQC: the mean before tanh; gSDE clips it first (``clip_mean``)."""
        layers = self._mlp("actor.latent_pi", end=True)
        if self._has("actor.mu.0"):
            clip = float(self.kwargs.get("clip_mean", 2.0))
            layers += [self._linear("actor.mu.0"), nn.Hardtanh(-clip, clip)]
        else:
            layers += [self._linear("actor.mu")]
        return Actor(self._encoders("actor.features_extractor"), nn.Sequential(*layers))

    def mlp_actor(self, extractor: str, name: str) -> Actor:
        """A plain MLP: the actor of TD3 and DDPG, ARS (whose linear policy was once a bare layer)."""
        layers = [self._linear(name)] if f"{name}.weight" in self.tensors else self._mlp(name, end=False)
        return Actor(self._encoders(extractor), nn.Sequential(*layers))

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix + ".") for name in self.tensors)

    def _linear(self, prefix: str) -> nn.Linear:
        weight = self._tensor(f"{prefix}.weight", dims=2)
        bias = self.tensors.get(f"{prefix}.bias")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        return _fill(layer, weight, bias)

    def _mlp(self, prefix: str, *, end: bool) -> list[nn.Module]:
        """Layers of SB3's ``create_mlp``: linear layers with an activation between, and after if ``end``."""
        indices = {
            name[len(prefix) + 1 :].split(".")[0] for name in self.tensors if name.startswith(prefix + ".")
        }
        if not indices and end:
            return []
        if not indices or not all(index.isdigit() for index in indices):
            raise InputError(
                f"this {self.algorithm} policy has no network {prefix!r} as SB3 builds it; use --trust"
            )
        layers: list[nn.Module] = []
        for index in sorted(map(int, indices)):
            layers += [self._linear(f"{prefix}.{index}"), self.activation()]
        return layers if end else layers[:-1]

    def _lstm(self, prefix: str) -> nn.LSTM:
        state = {n[len(prefix) + 1 :]: t for n, t in self.tensors.items() if n.startswith(prefix + ".")}
        layers = sum(name.startswith("weight_ih_l") for name in state)
        sizes = state["weight_ih_l0"].shape[1], state["weight_hh_l0"].shape[1]
        lstm = nn.LSTM(*sizes, num_layers=layers, bias="bias_ih_l0" in state)
        try:
            lstm.load_state_dict(state)
        except RuntimeError:
            raise InputError("this LSTM is bidirectional or projected, which rlquant cannot run") from None
        return lstm

    def _tensor(self, name: str, dims: int) -> Tensor:
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dim() != dims:
            raise InputError(f"this {self.algorithm} policy has no {dims}-dimensional weights {name!r}")
        return tensor

    def _encoders(self, prefix: str) -> dict[str, nn.Module]:
        """SB3's features extractor: Flatten, NatureCNN or one of these per key of a Dict."""
        if self.observation.kind != "dict":
            return {"": self._encoder(prefix, self.observation)}
        # Insertion order is SB3's order of concatenation; gymnasium sorts the keys of a Dict.
        return {
            key: self._encoder(f"{prefix}.extractors.{key}", part)
            for key, part in self.observation.spaces.items()
        }

    def _encoder(self, prefix: str, space: Space) -> nn.Module:
        names = {name[len(prefix) + 1 :] for name in self.tensors if name.startswith(prefix + ".")}
        if not names:
            return nn.Sequential(nn.Flatten())
        if not all(name.startswith(("cnn.", "linear.0.")) for name in names):
            odd = sorted(names)[0]
            raise InputError(
                f"this policy has a custom features extractor ({prefix}.{odd}); repeat with --trust"
            )
        layers: list[nn.Module] = []
        for index, stride in _NATURE_STRIDES.items():
            weight = self._tensor(f"{prefix}.cnn.{index}.weight", dims=4)
            conv = nn.Conv2d(
                weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]), stride=stride
            )
            layers += [_fill(conv, weight, self.tensors[f"{prefix}.cnn.{index}.bias"]), nn.ReLU()]
        layers += [nn.Flatten(), self._linear(f"{prefix}.linear.0"), nn.ReLU()]
        if space.kind != "box" or len(space.shape) != 3 or space.shape[0] != layers[0].in_channels:
            raise InputError(
                f"the CNN expects {layers[0].in_channels} image channels, not {space.describe()}"
            )
        return nn.Sequential(*layers)


def _fill(layer: _Layer, weight: Tensor, bias: Tensor | None) -> _Layer:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer


def activation_class(kwargs: dict[str, Any], default: str) -> type[nn.Module]:
    """The activation class named by ``policy_kwargs['activation_fn']``, printed as ``<class 'torch...Tanh'>``."""
    name = str(kwargs.get("activation_fn") or default).rstrip("'>").split(".")[-1]
    if name not in ACTIVATIONS:
        raise InputError(
            f"the activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}. If you trust the "
            "file's author, repeat with --trust"
        )
    extractor = str(kwargs.get("features_extractor_class") or "")
    if extractor and "stable_baselines3.common.torch_layers" not in extractor:
        raise InputError(f"this policy has a custom features extractor {extractor}; repeat with --trust")
    return ACTIVATIONS[name]


def _actor_critic_head(action: Space, kwargs: dict[str, Any]) -> str:
    if action.kind == "box":
        return "tanh" if kwargs.get("squash_output") else "clip"
    return {"discrete": "argmax", "multidiscrete": "multi_argmax", "multibinary": "threshold"}[action.kind]


def _ars_head(action: Space, kwargs: dict[str, Any]) -> str:
    if action.kind == "discrete":
        return "argmax"
    # A linear ARS policy clips; an MLP one ends in tanh (sb3_contrib.ars.policies).
    return "tanh" if kwargs.get("squash_output", True) else "clip"


def _average_quantiles(layer: nn.Module, actions: int) -> nn.Linear:
    """Rows ``[quantiles * actions, in]`` averaged over quantiles, in float64: ``[actions, in]``."""
    assert isinstance(layer, nn.Linear)
    rows = layer.weight.detach().double().view(-1, actions, layer.in_features)
    bias = layer.bias.detach().double().view(-1, actions)
    return _fill(nn.Linear(layer.in_features, actions), rows.mean(0).float(), bias.mean(0).float())


def _check_sizes(actor: Actor, head: Head, observation: Space, algorithm: str) -> None:
    """Try one observation: the network must take the observation space and fit the action space."""
    try:
        outputs, _ = actor(example_inputs(observation), actor.initial_state(1))
    except RuntimeError as error:
        raise InputError(f"the {algorithm} network does not take {observation.describe()}: {error}") from None
    if outputs.shape[1] != head.outputs:
        raise InputError(
            f"the {algorithm} network puts out {outputs.shape[1]} numbers, but its action space "
            f"{head.space.describe()} takes {head.outputs}"
        )


def example_inputs(observation: Space, rows: int = 1) -> dict[str, Tensor]:
    """Zeros as the network sees them, ``[rows, features or *shape]`` by key."""
    parts = observation.spaces if observation.kind == "dict" else {"": observation}
    return {
        key: torch.zeros(rows, *(part.shape if part.kind == "box" else (flat_size(part),)))
        for key, part in parts.items()
    }
