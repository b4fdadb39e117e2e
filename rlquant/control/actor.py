"""The network of a deployable policy: encoders, an optional recurrent core and a trunk.

``{key: observation part} -> encoders -> concat -> [LSTM] -> trunk -> head outputs``. The critic, the
exploration noise and the optimiser stay behind. Every layer is a stock torch module, so that
``rlquant.quant`` sees nothing special; the layers can be told as plain JSON, so that an artifact rebuilds
them without running code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError, unknown_name

__all__ = ["ACTIVATIONS", "Actor", "FeatureMap", "build_layers", "describe_layers"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        *(nn.Tanh, nn.ReLU, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Identity),
        *(nn.SELU, nn.Softplus, nn.Mish, nn.Softsign, nn.Hardswish, nn.ReLU6),
    )
}


class FeatureMap(nn.Module):
    """``(x - low) / span`` per feature of ``[n, features]``: where an 8-bit grid for observations begins.

    Buffers: ``low`` and ``inverse_span``, float32 ``[features]``.
    """

    low: Tensor
    inverse_span: Tensor

    def __init__(self, low: Tensor, span: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low.clone())
        self.register_buffer("inverse_span", 1.0 / span)

    @property
    def features(self) -> int:
        """How many features."""
        return len(self.low)

    @classmethod
    def empty(cls, features: int) -> FeatureMap:
        """A map to be filled by ``load_state_dict``."""
        return cls(torch.zeros(features), torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, features]`` to the same shape."""
        return (x - self.low) * self.inverse_span


class Actor(nn.Module):
    """A policy network without its training parts.

    Args:
        encoders: one per observation part, each mapping ``[n, *shape]`` float32 to ``[n, features]``;
            the key is ``""`` where the observation is no Dict. A dot in a key is not allowed by torch and is
            replaced by an underscore.
        trunk: maps the concatenated features to the head outputs ``[n, outputs]``.
        rnn: an LSTM or GRU between encoders and trunk, or None.
    """

    rnn: Any

    def __init__(
        self, encoders: dict[str, nn.Module], trunk: nn.Module, rnn: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.keys = tuple(encoders)
        self.encoders = nn.ModuleDict({_module_name(key): module for key, module in encoders.items()})
        self.rnn = rnn
        self.trunk = trunk

    def forward(self, parts: dict[str, Tensor], state: Any = None) -> tuple[Tensor, Any]:
        """Head outputs for one step.

        Args:
            parts: float32 ``[n, *shape]`` by observation key.
            state: of the recurrent core, ``[layers, n, hidden]`` each; None for a network without one.

        Returns:
            Outputs ``[n, outputs]`` and the next state.
        """
        features = [self.encoder(key)(parts[key]) for key in self.keys]
        x = features[0] if len(features) == 1 else torch.cat(features, dim=1)  # [n, features]
        if self.rnn is not None:
            out, state = self.rnn(x.unsqueeze(0), state)  # [1, n, features] -> [1, n, hidden]
            x = out.squeeze(0)
        return self.trunk(x), state

    def encoder(self, key: str) -> nn.Module:
        """The encoder of one observation part."""
        return self.encoders[_module_name(key)]

    def set_encoder(self, key: str, encoder: nn.Module) -> None:
        """Replace the encoder of one observation part."""
        self.encoders[_module_name(key)] = encoder

    def initial_state(self, rows: int) -> Any:
        """Zeros ``[layers, rows, hidden]``: a pair for an LSTM, one tensor for a GRU, None without a core."""
        if self.rnn is None:
            return None
        zeros = torch.zeros(self.rnn.num_layers, rows, self.rnn.hidden_size)
        return (zeros, zeros.clone()) if "LSTM" in type(self.rnn).__name__ else zeros

    def describe(self) -> dict[str, Any]:
        """The architecture as plain JSON; :meth:`build` is its inverse."""
        return {
            "encoders": {key: describe_layers(self.encoder(key)) for key in self.keys},
            "rnn": None if self.rnn is None else describe_layers(self.rnn)[0],
            "trunk": describe_layers(self.trunk),
        }

    @classmethod
    def build(cls, doc: dict[str, Any]) -> Actor:
        """The network of a description, with fresh weights."""
        encoders: dict[str, nn.Module] = {
            key: build_layers(layers) for key, layers in doc["encoders"].items()
        }
        rnn = None if doc["rnn"] is None else build_layers([doc["rnn"]])[0]
        return cls(encoders, build_layers(doc["trunk"]), rnn)


def _module_name(key: str) -> str:
    return key.replace(".", "_") or "observation"


def describe_layers(module: nn.Module) -> list[dict[str, Any]]:
    """Layers of a Sequential (or one layer) as plain JSON.

    Raises:
        InputError: a layer is of a kind that cannot be told in JSON.
    """
    if isinstance(module, nn.Sequential):
        return [doc for layer in module for doc in describe_layers(layer)]
    name = type(module).__name__.removeprefix("Quant")
    if name == "Linear":
        fields: tuple[str, ...] = ("in_features", "out_features")
    elif name == "Conv2d":
        fields = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    elif name in ("LSTM", "GRU"):
        fields = ("input_size", "hidden_size", "num_layers")
    elif name == "Hardtanh":
        fields = ("min_val", "max_val")
    elif name == "FeatureMap":
        fields = ("features",)
    elif name == "Flatten":
        fields = ()
    elif name in ACTIVATIONS:
        fields = ("negative_slope",) if name == "LeakyReLU" else ("alpha",) if name == "ELU" else ()
    else:
        raise InputError(
            f"a layer {type(module).__name__} cannot be stored in an artifact; supported: Linear, Conv2d, LSTM, "
            f"GRU, Flatten, Hardtanh, {', '.join(ACTIVATIONS)} in nn.Sequential"
        )
    doc: dict[str, Any] = {"layer": name}
    for field in fields:
        value = getattr(module, field)
        doc[field] = list(value) if isinstance(value, tuple) else value
    if name in ("Linear", "Conv2d"):
        doc["bias"] = module.bias is not None
    return [doc]


def build_layers(docs: list[dict[str, Any]]) -> nn.Sequential:
    """The inverse of :func:`describe_layers`."""
    known: dict[str, Any] = {"Linear": nn.Linear, "Conv2d": nn.Conv2d, "LSTM": nn.LSTM, "GRU": nn.GRU}
    known |= {"FeatureMap": FeatureMap.empty, "Flatten": nn.Flatten, "Hardtanh": nn.Hardtanh} | ACTIVATIONS
    layers = []
    for doc in docs:
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in doc.items() if k != "layer"}
        if doc["layer"] not in known:
            raise unknown_name("layer", doc["layer"], known)
        layers.append(known[doc["layer"]](**arguments))
    return nn.Sequential(*layers)
