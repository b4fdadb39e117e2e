"""What every folder with a language model needs: written whole, and read without making weights first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.load import DTYPES, transformers_module
from rlquant.llm.model import LanguageModel

__all__ = ["WEIGHTS", "empty_model", "folder_bytes", "remake_buffers", "write_model"]

WEIGHTS = "model.safetensors"


def write_model(lm: LanguageModel, folder: Path, tensors: Mapping[str, Tensor], *, mark: str) -> None:
    """Write weights, generation settings and tokenizer.

    Args:
        lm: whose settings and tokenizer they are.
        folder: made if missing.
        tensors: by name; none may share memory with another.
        mark: the file whose presence says that a folder is finished: removed first, and to be written last.

    Raises:
        InputError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    temporary = folder / f".{WEIGHTS}.{os.getpid()}.tmp"
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark).unlink(missing_ok=True)
        save_file(held, temporary, {"format": "pt"})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / WEIGHTS)
        lm.model.generation_config.save_pretrained(folder)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(folder)
    except OSError as error:
        if folder.is_dir():
            temporary.unlink(missing_ok=True)
        raise InputError(f"{folder} cannot be written to: {error.strerror or error}") from None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def empty_model(folder: Path, dtype: str) -> Any:
    """The float model of a folder's config.json without any weights, on the meta device.

    :func:`remake_buffers` makes the rest once there are weights. Raises InputError where config.json names no model.
    """
    transformers = transformers_module()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it would be saved with whatever becomes of the model
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        if (folder / "generation_config.json").exists():
            model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} names no model that can be made: {str(error).splitlines()[0]}") from None
    return model


def remake_buffers(model: Any) -> None:
    """Buffers that no checkpoint holds: rotary frequencies come from the constructor of their module, the factor of
    Gemma's embedding from its attribute."""
    for name, part in list(model.named_modules()):
        if not any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            continue
        if hasattr(part, "scalar_embed_scale"):
            part.embed_scale = torch.tensor(part.scalar_embed_scale, dtype=part.embed_scale.dtype)
        else:
            model.set_submodule(name, type(part)(model.config))
