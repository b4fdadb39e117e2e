"""compressed-tensors: packed integer weights, and integer weights beside integer activations.

``pack-quantized``, for weights of 2, 4 or 8 bits with K inputs, N outputs and G groups:

- ``weight_packed`` int32 ``[N, ceil(K * bits / 32)]``: codes, and ``weight_shape`` int64 ``[2]``;
- ``weight_scale`` ``[N, G]``, written as float32: nothing is rounded (transformers casts them to the dtype it is
  asked for, so bfloat16 rounds them there);
- ``weight_zero_point`` int32 ``[ceil(N * bits / 32), G]``, packed along the outputs; asymmetric weights only;
- ``weight_g_idx`` int32 ``[K]``, where GPTQ's act-order dealt columns into groups.

``int-quantized``, for w8a8: ``weight`` int8 ``[N, K]``, ``weight_scale`` ``[N, 1]`` and, for static activations,
``input_scale`` and ``input_zero_point`` ``[1]``. Codes of activations are ``round(x * (1 / scale)) + zero_point``, as
in vLLM's int8 kernels; compressed-tensors' own fake quantization adds the zero point before it rounds, in float32, and
takes the other code for a few values in a million that lie halfway between two (``benchmarks/checkpoints.md``).

Each scheme is a group of ``config_groups``, so layers may differ and some may stay floats.

Source: compressed-tensors 0.20, ``compressors/pack_quantized``, ``compressors/naive_quantized`` and
``quantization/lifecycle/forward_helpers``; vLLM, ``csrc/quantization/w8a8/int8/scaled_quant.cu``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.checkpoints.affine_linear import AffineLinear, int_scheme
from rlquant.llm.checkpoints.layout import declared, whole_groups
from rlquant.llm.checkpoints.permuted import group_order
from rlquant.llm.checkpoints.shards import LayerTensors
from rlquant.llm.checkpoints.words import from_words, to_words
from rlquant.quant import QParams, Scheme, unsigned

__all__ = ["CompressedTensors"]

BITS = (2, 4, 8)
PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_HALF = 128
"""What int8 codes are moved by to be unsigned."""


class CompressedTensors:
    """See the module."""

    mark = "weight_scale"
    repeats_head = False

    def config(self, schemes: Mapping[str, Scheme], floats: Sequence[str], permuted: bool) -> dict[str, Any]:
        """``quantization_config`` with a group for each scheme."""
        by_scheme: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(name)
        groups = {}
        for number, (scheme, names) in enumerate(by_scheme.items()):
            targets = ["Linear"] if len(by_scheme) == 1 else names
            groups[f"group_{number}"] = {"targets": targets, **_described(scheme, permuted)}
        forms = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": forms.pop() if len(forms) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ["lm_head", *floats],
            "kv_cache_scheme": None,
        }

    def to_tensors(self, stored: AffineLinear, name: str) -> dict[str, Tensor]:
        """Those of ``pack-quantized`` or, where activations are quantized too, of ``int-quantized``."""
        rows, columns = stored.codes.shape
        whole_groups(stored.scheme, columns, name)
        if stored.scheme.activations is not None:
            return _integer_tensors(stored)
        tensors = {
            "weight_packed": _packed(stored.codes, stored.bits),
            "weight_scale": stored.scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not stored.scheme.symmetric:
            tensors["weight_zero_point"] = _packed(stored.zero_point.t(), stored.bits).t()
        if stored.order is not None:
            raise InputError(
                f"{name} has columns in GPTQ's act-order; those are written to gptq, not to compressed-tensors"
            )
        return tensors

    def from_tensors(
        self, config: Mapping[str, Any], tensors: LayerTensors, rows: int, columns: int
    ) -> AffineLinear:
        """Read a layer by the group whose targets name it."""
        group = _group_of(tensors.layer, config)
        scheme = _weight_scheme(group, tensors.layer)
        scale_rows = 1 if group["weights"]["strategy"] == "tensor" else rows
        count = scheme.granularity.scale_shape(rows, columns)[1]
        packed = "weight_packed" in tensors
        if packed:
            codes, points = _read_packed(scheme, tensors, rows, columns)
        else:
            codes = tensors.take("weight", (rows, columns), torch.int8).to(torch.int32) + _HALF
            points = torch.full((rows, count), _HALF, dtype=torch.int32)
            if not scheme.symmetric:
                points = tensors.take("weight_zero_point", (scale_rows, count), torch.int8).int() + _HALF
        shape = (1,) if scale_rows == 1 and rows > 1 else (scale_rows, count)
        scale = tensors.take_scale("weight_scale", shape).view(scale_rows, count)
        stored = AffineLinear(scheme, codes, scale.expand(rows, -1), points.expand(rows, -1))
        if "weight_g_idx" in tensors:
            stored = _sorted(stored, tensors, columns)
        return _with_activations(stored, group.get("input_activations"), tensors)


def _described(scheme: Scheme, permuted: bool) -> dict[str, Any]:
    """A group of ``config_groups`` without its targets."""
    size = scheme.granularity.group_size
    weights = {
        "num_bits": scheme.weights.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if size else "channel",
        "group_size": size,
        "dynamic": False,
    }
    if scheme.activations is None:
        if scheme.weights.bits not in BITS:
            raise InputError(
                f"compressed-tensors packs 2, 4 or 8 bits, not the {scheme.weights.bits} of {scheme.name}"
            )
        return {"weights": weights, "input_activations": None, "format": PACKED}
    if (scheme.weights.bits, scheme.activations.bits, size, scheme.symmetric) != (8, 8, None, True):
        raise InputError(
            f"compressed-tensors checkpoints quantize activations beside 8-bit weights per channel: w8a8 or "
            f"w8a8-dynamic, not {scheme.name}"
        )
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": "token" if scheme.dynamic else "tensor",
        "dynamic": scheme.dynamic,
    }
    return {"weights": weights, "input_activations": inputs, "format": INTEGER}


def _integer_tensors(stored: AffineLinear) -> dict[str, Tensor]:
    tensors = {"weight": (stored.codes - _HALF).to(torch.int8), "weight_scale": stored.scale}
    if stored.activation is not None:
        assert stored.activation.zero_point is not None
        tensors["input_scale"] = stored.activation.scale.view(1)
        tensors["input_zero_point"] = (stored.activation.zero_point - _HALF).to(torch.int8).view(1)
    return tensors


def _packed(codes: Tensor, bits: int) -> Tensor:
    """``[lines, n]`` -> int32 ``[lines, ceil(n * bits / 32)]``."""
    missing = -codes.shape[1] % (32 // bits)
    return to_words(torch.nn.functional.pad(codes, (0, missing)), bits)


def _read_packed(scheme: Scheme, tensors: LayerTensors, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes ``[rows, columns]`` and zero points ``[rows, groups]``."""
    bits, count = scheme.weights.bits, scheme.granularity.scale_shape(rows, columns)[1]
    shape = tensors.take("weight_shape", (2,), torch.int64, torch.int32)
    if shape.tolist() != [rows, columns]:
        raise InputError(
            f"{tensors.name('weight_shape')} says {shape.tolist()}, but the model's config.json makes it "
            f"{[rows, columns]}"
        )
    words = tensors.take("weight_packed", (rows, -(-columns * bits // 32)), torch.int32)
    codes = from_words(words, bits, columns)
    if scheme.symmetric:
        return codes, torch.full((rows, count), 2 ** (bits - 1), dtype=torch.int32)
    points = tensors.take("weight_zero_point", (-(-rows * bits // 32), count), torch.int32)
    return codes, from_words(points.t(), bits, rows).t()


def _sorted(stored: AffineLinear, tensors: LayerTensors, columns: int) -> AffineLinear:
    """Columns in the order of their groups; an index of -1 everywhere says that they are."""
    g_idx = tensors.take("weight_g_idx", (columns,), torch.int32, torch.int64)
    if bool((g_idx == -1).all()):
        return stored
    order = group_order(g_idx, stored.group_size, tensors.name("weight_g_idx"))
    return stored if order is None else replace(stored, codes=stored.codes[:, order], order=order)


def _group_of(layer: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of ``config_groups`` whose targets name a layer."""
    if config.get("kv_cache_scheme"):
        raise InputError(
            "the checkpoint quantizes the KV cache (kv_cache_scheme), which is not read: see --kv-cache"
        )
    groups = declared(config, "config_groups", dict)
    for group in groups.values():
        targets = group.get("targets", []) if isinstance(group, dict) else []
        if any(_names(target, layer) for target in targets):
            if not isinstance(group.get("weights"), dict):
                raise InputError(f"quantization_config says nothing of the weights of {layer}")
            return dict(group)
    raise InputError(f"{layer} is quantized, but no group of quantization_config names it")


def _names(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], layer) is not None
    return target in ("Linear", layer)


def _weight_scheme(group: Mapping[str, Any], layer: str) -> Scheme:
    weights = group["weights"]
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    known = weights.get("type") == "int" and bits in BITS and strategy in ("group", "channel", "tensor")
    if not known or weights.get("dynamic"):
        raise InputError(
            f"{layer} has {weights.get('type')} weights of {bits} bits per {strategy}; those that are read: int of "
            "2, 4 or 8 bits, per group, channel or tensor"
        )
    size = declared(weights, "group_size", int) if strategy == "group" else None
    return int_scheme(bits, size, symmetric=bool(weights.get("symmetric", True)))


def _with_activations(stored: AffineLinear, inputs: Any, tensors: LayerTensors) -> AffineLinear:
    """With the activations that the group describes."""
    if not inputs:
        return stored
    kind = tuple(inputs.get(key) for key in ("num_bits", "type", "strategy"))
    dynamic, symmetric = bool(inputs.get("dynamic")), bool(inputs.get("symmetric", True))
    if kind != (8, "int", "token" if dynamic else "tensor") or (dynamic and symmetric):
        raise InputError(
            f"{tensors.layer} quantizes its inputs {'dynamically' if dynamic else 'statically'} to {kind[1]}{kind[0]} "
            f"per {kind[2]}, {'symmetric' if symmetric else 'asymmetric'}; those that are read: int8, static per "
            "tensor, or dynamic per token and asymmetric"
        )
    scheme = replace(stored.scheme, activations=unsigned(8), dynamic=dynamic)
    if dynamic:
        return replace(stored, scheme=scheme)
    scale = tensors.take_scale("input_scale", (1,)).view(())
    point = torch.tensor(0, dtype=torch.int8)
    if not symmetric:
        point = tensors.take("input_zero_point", (1,), torch.int8).view(())
    return replace(stored, scheme=scheme, activation=QParams(scale, point.int() + _HALF))
