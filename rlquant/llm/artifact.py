"""A quantized language model as a folder: config.json, tokenizer, packed weights as safetensors, rlquant.json.

``rlquant.json`` comes last and carries the hash of the weights, so a folder without it is not finished, and a damaged
one is noticed. Nothing in it is code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlquant.errors import InputError
from rlquant.llm.folders import WEIGHTS, empty_model, folder_bytes, remake_buffers, write_model
from rlquant.llm.load import ARTIFACT, read_config, tokenizer_of
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, prepare_
from rlquant.quant import QuantEmbedding
from rlquant.runs import file_hash, write_atomic

__all__ = ["SCHEMA", "load_artifact", "save_artifact"]

SCHEMA = "rlquant.lm/1"


def save_artifact(lm: LanguageModel, folder: str | Path, *, dtype: str) -> int:
    """Write a quantized model and return the bytes on disk; a file that is there already is replaced at the end.

    Args:
        lm: from :func:`~rlquant.llm.quantize.quantize_model_`.
        folder: made if missing.
        dtype: of what is not quantized.

    Raises:
        InputError: the folder cannot be written to.
    """
    path = Path(folder)
    write_model(lm, path, _tensors(lm.model), mark=ARTIFACT)
    write_atomic(path / "config.json", lm.model.config.to_json_string())
    document = {
        "schema": SCHEMA,
        "precision": lm.precision,
        "method": lm.method,
        "dtype": dtype,
        "made_from": {"source": lm.source, "sha256": lm.sha256},
        "sha256": file_hash(path / WEIGHTS),
    }
    write_atomic(path / ARTIFACT, json.dumps(document, indent=1))
    return folder_bytes(path)


def load_artifact(folder: Path, *, device: str = "cpu") -> LanguageModel:
    """Read what :func:`save_artifact` wrote; packed weights stay packed.

    Raises:
        InputError: it is incomplete, damaged, or of another schema.
    """
    document = _document(folder)
    if file_hash(folder / WEIGHTS) != document["sha256"]:
        raise InputError(
            f"{folder / WEIGHTS} does not match its hash in {ARTIFACT}: it was damaged or swapped"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_config(folder)
    model = empty_model(folder, document["dtype"])
    try:
        prepare_(model, Plan.parse(document["precision"], document["method"]))
        tensors = load_file(folder / WEIGHTS)
        unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(model.get_input_embeddings(), QuantEmbedding):  # which is tied already
        model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing or unexpected:
        raise InputError(
            f"{folder} does not fit its own config.json: {(missing or unexpected)[0]} is missing or too many"
        )
    remake_buffers(model)
    made_from = document["made_from"]
    return LanguageModel(
        model.eval().to(device),
        tokenizer_of(str(folder)),
        made_from["source"],
        document["precision"],
        document["method"],
        made_from["sha256"],
    )


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """The state dict, what is tied once."""
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor
    return tensors


def _document(folder: Path) -> dict[str, Any]:
    try:
        document = json.loads((folder / ARTIFACT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder / ARTIFACT} cannot be read: it is damaged") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f"{folder / ARTIFACT} has the schema {schema!r}; this rlquant reads {SCHEMA!r}: upgrade rlquant"
        )
    wanted = {"precision": str, "method": str, "dtype": str, "made_from": dict, "sha256": str}
    for key, kind in wanted.items():
        if not isinstance(document.get(key), kind):
            raise InputError(f"{folder / ARTIFACT} is damaged: {key} is {document.get(key)!r}")
    return dict(document)
