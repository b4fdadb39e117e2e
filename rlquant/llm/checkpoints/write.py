"""Quantized language models as checkpoints that other libraries load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlquant.errors import InputError, unknown_name
from rlquant.llm.checkpoints.affine_linear import AffineLinear
from rlquant.llm.checkpoints.formats import FORMATS
from rlquant.llm.checkpoints.permuted import PermutedLinear
from rlquant.llm.folders import folder_bytes, write_model
from rlquant.llm.model import LanguageModel, decoder_of
from rlquant.quant import QuantizedLayer, QuantLinear
from rlquant.runs import write_atomic

__all__ = ["write_checkpoint"]


def write_checkpoint(lm: LanguageModel, folder: str | Path, form: str) -> int:
    """Write a quantized model in a format that others read, and return the bytes on disk.

    The folder has config.json with ``quantization_config``, so that ``AutoModelForCausalLM.from_pretrained`` loads
    it. config.json comes last and goes first, so a folder with one is finished. What is not quantized keeps its
    dtype. GPTQ and AWQ round scales to float16, which moves a weight by at most one part in 2,048;
    compressed-tensors keeps them.

    Args:
        lm: from :func:`~rlquant.llm.quantize.quantize_model_` or a loaded artifact.
        folder: made if missing.
        form: a name of ``FORMATS``.

    Raises:
        InputError: the format is unknown or cannot hold the model (the layer is named), or the folder cannot be
            written to.
    """
    if form not in FORMATS:
        raise unknown_name("checkpoint format", form, FORMATS)
    layers = _quantized(lm.model)
    schemes = {name: layer.scheme for name, layer in layers.items()}
    permuted = any(isinstance(layer, PermutedLinear) for layer in layers.values())
    config = FORMATS[form].config(schemes, _floats(lm.model), permuted)
    tensors = _unquantized(lm.model, layers, repeats_head=FORMATS[form].repeats_head)
    for name, layer in layers.items():
        stored = AffineLinear.of(layer, name)
        parts = FORMATS[form].to_tensors(stored, name)
        if layer.bias is not None:
            parts["bias"] = layer.bias
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    path = Path(folder)
    write_model(lm, path, tensors, mark="config.json")
    for name, content in _files(lm.model, config).items():
        write_atomic(path / name, content)
    return folder_bytes(path)


def _quantized(model: Any) -> dict[str, QuantLinear]:
    """The quantized layers of the blocks."""
    layers: dict[str, QuantLinear] = {}
    prefix = f"{_name_of(model, decoder_of(model).layers)}."
    for name, part in model.named_modules():
        if not isinstance(part, QuantizedLayer):
            continue
        if not isinstance(part, QuantLinear) or not name.startswith(prefix):
            raise InputError(
                f"{name} is quantized to {part.scheme.name}; these checkpoint formats keep the embedding and the "
                "output layer as floats: quantize again without '+embedding=…'"
            )
        layers[name] = part
    if not layers:
        raise InputError(
            "nothing in the model is quantized: give the artifact that 'rlquant quantize MODEL --scheme int4-g128 "
            "--out DIR' writes"
        )
    return layers


def _floats(model: Any) -> list[str]:
    """Linear layers in the blocks that are floats."""
    blocks = decoder_of(model).layers
    prefix = _name_of(model, blocks)
    return [f"{prefix}.{name}" for name, part in blocks.named_modules() if isinstance(part, nn.Linear)]


def _name_of(model: Any, wanted: nn.Module) -> str:
    return str(next(name for name, part in model.named_modules() if part is wanted))


def _unquantized(model: Any, layers: dict[str, QuantLinear], *, repeats_head: bool) -> dict[str, Tensor]:
    """Everything that is no part of a quantized layer; a tied output layer is left out or a copy."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    inside = tuple(f"{layer}." for layer in layers)
    tensors = {name: each for name, each in model.state_dict().items() if not name.startswith(inside)}
    if head.weight is embedding.weight:
        name = f"{_name_of(model, head)}.weight"
        tied = tensors.pop(name)
        if repeats_head:
            tensors[name] = tied.clone()
    return tensors


def _files(model: Any, config: dict[str, Any]) -> dict[str, str]:
    """JSON files by name, config.json last."""
    document = json.loads(model.config.to_json_string())
    document["quantization_config"] = config
    document.setdefault("architectures", [type(model).__name__])
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    # What transformers 4, and libraries that build on it, call these.
    document["dtype"] = document["torch_dtype"] = dtype
    rotary = document.get("rope_parameters")
    if isinstance(rotary, dict) and rotary.get("rope_type") == "default" and "rope_theta" in rotary:
        document["rope_theta"] = rotary["rope_theta"]
    files = {"config.json": json.dumps(document, indent=2)}
    if config["quant_method"] == "gptq":
        files = {"quantize_config.json": json.dumps(config, indent=2), **files}
    return files
