"""Quantized checkpoints that others made, or that :mod:`~rlquant.llm.checkpoints.write` did, as language models."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError, unknown_name
from rlquant.llm.checkpoints.formats import FORMATS
from rlquant.llm.checkpoints.shards import LayerTensors, Shards
from rlquant.llm.folders import empty_model, remake_buffers
from rlquant.llm.load import DTYPES, read_config, tokenizer_of
from rlquant.llm.model import LanguageModel, decoder_of
from rlquant.llm.quantize import Plan
from rlquant.quant import QuantLinear, Scheme

__all__ = ["read_checkpoint"]


def read_checkpoint(path: str | Path, *, dtype: str = "bf16", device: str = "cpu") -> LanguageModel:
    """Load a GPTQ, AWQ or compressed-tensors checkpoint; packed weights stay packed.

    Args:
        path: a folder with config.json and safetensors.
        dtype: of what is not quantized: ``fp32``, ``bf16`` or ``fp16``.
        device: where it goes.

    Raises:
        InputError: it is incomplete or damaged (the tensor is named), or says what is not supported.
    """
    folder = Path(path)
    config = _quantization_config(folder)
    method = str(config.get("quant_method"))
    if method not in FORMATS:
        raise unknown_name("checkpoint format", method, FORMATS)
    layout, shards = FORMATS[method], Shards(folder)
    model = empty_model(folder, dtype)
    schemes: dict[str, Scheme] = {}
    for name, linear in list(model.named_modules()):
        tensors = LayerTensors(shards, name)
        if not isinstance(linear, nn.Linear) or layout.mark not in tensors:
            continue
        if linear is model.get_output_embeddings():
            raise InputError(f"{name} of {folder} is quantized; an output layer is read as a float only")
        stored = layout.from_tensors(config, tensors, linear.out_features, linear.in_features)
        schemes[name] = stored.scheme
        layer = stored.layer(linear)
        layer.bias = _bias(linear, tensors, DTYPES[dtype])
        model.set_submodule(name, layer)
    if not schemes:
        raise InputError(f"{folder} holds no {layout.mark}, so nothing in it is quantized as {method}")
    _load_floats(model, shards, DTYPES[dtype])
    remake_buffers(model)
    return LanguageModel(
        model.eval().to(device), tokenizer_of(str(folder)), str(path), _plan(model, schemes).name, method
    )


def _quantization_config(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of config.json, or AutoGPTQ's own file where there is none."""
    config = read_config(folder).get("quantization_config")
    if config is None:
        try:
            found = json.loads((folder / "quantize_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        config = {"quant_method": "gptq", **found} if isinstance(found, dict) else None
    if not isinstance(config, dict):
        raise InputError(
            f"{folder / 'config.json'} has no quantization_config: it is no quantized checkpoint"
        )
    return config


def _bias(linear: nn.Linear, tensors: LayerTensors, dtype: torch.dtype) -> Tensor | None:
    """A layer's bias. Older AutoGPTQ stored zeros where there is none."""
    if linear.bias is None and "bias" not in tensors:
        return None
    bias = tensors.take("bias", (linear.out_features,)).to(dtype)
    return None if linear.bias is None and not bool(bias.any()) else bias


def _load_floats(model: Any, shards: Shards, dtype: torch.dtype) -> None:
    """What is not quantized."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    tensors: dict[str, Tensor] = {}
    for name in shards.names():
        if name.endswith("rotary_emb.inv_freq"):  # older transformers saved what the config says
            continue
        if name not in wanted:
            raise InputError(f"{shards.folder} holds {name}, which its config.json has no place for")
        tensors[name] = shards.take(name)
        if tensors[name].shape != wanted[name].shape:
            raise InputError(
                f"{name} does not fit the model's config.json: it is {list(tensors[name].shape)}, not "
                f"{list(wanted[name].shape)}"
            )
    model.load_state_dict({name: each.to(dtype) for name, each in tensors.items()}, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise InputError(f"{shards.folder} is incomplete: the tensor {missing[0]} is missing")


def _plan(model: Any, schemes: dict[str, Scheme]) -> Plan:
    """The plan by which such a model would be quantized: the most frequent scheme, and what deviates."""
    layers = [name for name, part in decoder_of(model).layers.named_modules() if _is_linear(part)]
    prefix = "model.layers."
    named = {name: schemes.get(prefix + name, Scheme.parse("fp32")) for name in layers}
    [(common, _)] = Counter(schemes.values()).most_common(1)
    count = len(decoder_of(model).layers)
    others: dict[str, Scheme] = {}
    for name, scheme in named.items():
        if scheme == common:
            continue
        inside = name.partition(".")[2]
        alike = all(named.get(f"{index}.{inside}") == scheme for index in range(count))
        others[f"layers.*.{inside}" if alike else f"layers.{name}"] = scheme
    return Plan(common, schemes=others)


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear | QuantLinear)
