"""A quantized language model as a folder: config.json, tokenizer, packed weights as safetensors, rlquant.json.

``rlquant.json`` comes last and carries the hash of the weights, so a folder without it is not finished, and a damaged
one is noticed. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from rlquant.errors import InputError
from rlquant.llm.load import ARTIFACT, DTYPES, read_config, tokenizer_of, transformers_module
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, prepare_
from rlquant.quant import QuantEmbedding
from rlquant.runs import write_atomic

__all__ = ["SCHEMA", "load_artifact", "save_artifact"]

SCHEMA = "rlquant.lm/1"
_WEIGHTS = "model.safetensors"


def save_artifact(lm: LanguageModel, folder: str | Path, *, dtype: str) -> int:
    """Write a quantized model and return the bytes on disk; a file that is there already is replaced at the end.

    Args:
        lm: from :func:`~rlquant.llm.quantize.quantize_model_`.
        folder: made if missing.
        dtype: of what is not quantized.

    Raises:
        InputError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    path = Path(folder)
    temporary = path / f".{_WEIGHTS}.{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ARTIFACT).unlink(missing_ok=True)
        save_file(_tensors(lm.model), temporary, {"format": "pt"})
        temporary.replace(path / _WEIGHTS)
        lm.model.config.save_pretrained(path)
        lm.model.generation_config.save_pretrained(path)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{folder} cannot be written to: {error.strerror or error}") from None
    document = {
        "schema": SCHEMA,
        "precision": lm.precision,
        "method": lm.method,
        "dtype": dtype,
        "made_from": {"source": lm.source, "sha256": lm.sha256},
        "sha256": _digest(path / _WEIGHTS),
    }
    write_atomic(path / ARTIFACT, json.dumps(document, indent=1))
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def load_artifact(folder: Path, *, device: str = "cpu") -> LanguageModel:
    """Read what :func:`save_artifact` wrote; packed weights stay packed.

    Raises:
        InputError: it is incomplete, damaged, or of another schema.
    """
    document = _document(folder)
    digest = _digest(folder / _WEIGHTS)
    if digest != document["sha256"]:
        raise InputError(
            f"{folder / _WEIGHTS} does not match its hash in {ARTIFACT}: it was damaged or swapped"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_config(folder)
    transformers = transformers_module()
    config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    try:
        # Buffers that are in no state dict (rotary frequencies) are made by the constructor, so it is no meta device.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[document["dtype"]])
        prepare_(model, Plan.parse(document["precision"], document["method"]))
        missing, unexpected = model.load_state_dict(load_file(folder / _WEIGHTS), strict=False)
    except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(model.get_input_embeddings(), QuantEmbedding):  # which is tied already
        model.tie_weights()
    lost = [name for name in missing if not name.startswith("lm_head")]
    if lost or unexpected:
        raise InputError(
            f"{folder} does not fit its own config.json: {(lost or unexpected)[0]} is missing or too many"
        )
    with suppress(OSError):  # there is none
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
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
        tensors[name] = tensor.detach().to("cpu").contiguous()
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


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return (
                hashlib.file_digest(file, "sha256").hexdigest()
                if hasattr(hashlib, "file_digest")
                else _slow(file)
            )
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _slow(file: Any) -> str:
    """For Python 3.10."""
    digest = hashlib.sha256()
    while chunk := file.read(2**22):
        digest.update(chunk)
    return digest.hexdigest()
