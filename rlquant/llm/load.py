"""Language models from folders, GGUF files and the Hub. What a source is, is read off it, never guessed.

Nothing of a model's own code is run, and pickled weights are refused, unless the caller trusts the source.
"""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from rlquant.errors import InputError, missing_package, unknown_name
from rlquant.llm.model import LanguageModel
from rlquant.runs import file_hash
from rlquant.sources import is_hub_id

__all__ = ["ARTIFACT", "DTYPES", "load", "read_config", "tokenizer_of", "transformers_module"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARTIFACT = "rlquant.json"
_READERS = ("gptq", "awq", "compressed-tensors")


def load(
    source: str, *, dtype: str = "bf16", device: str = "cpu", trust: bool = False, lazy: bool = False
) -> LanguageModel:
    """Load a causal language model.

    Args:
        source: an rlquant artifact, a transformers folder (also one that GPTQ, AWQ or compressed-tensors wrote), a
            ``.gguf`` file or a folder with one, or a Hub id with an optional ``@revision``.
        dtype: of what is not quantized: ``fp32``, ``bf16`` or ``fp16``.
        device: where it goes.
        trust: run code that comes with the model, and read pickled weights.
        lazy: leave float weights in their safetensors files where that can be, for
            :func:`~rlquant.llm.quantize.quantize_model_` to read them block by block; nothing else can compute with
            such a model. Only where ``device`` is the CPU.

    Raises:
        InputError: there is no such source, it is damaged, or of a kind that cannot be read; a package is missing.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    path = Path(source).expanduser()
    if not path.exists():
        return _from_hub(source, dtype, device, trust, lazy)
    gguf = _gguf_file(path)
    if gguf is not None:
        return _from_gguf(gguf, dtype, device)
    if not path.is_dir():
        raise InputError(
            f"{source} is a file, but no .gguf: give the folder of the model, with its config.json"
        )
    if (path / ARTIFACT).exists():
        from rlquant.llm.artifact import load_artifact

        return load_artifact(path, device=device)
    config = read_config(path)
    quantized = config.get("quantization_config")
    if quantized is not None:
        return _from_checkpoint(path, quantized, dtype, device)
    lm = _floats(str(path), path if lazy else None, dtype, device, trust)
    return lm.but(source=source, sha256=_weights_hash(path))


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises InputError where it is missing or damaged."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{folder} holds no config.json: a model's folder has one, with tokenizer.json and *.safetensors beside it"
        ) from None
    except ValueError:
        raise InputError(f"{folder / 'config.json'} is damaged: it is not JSON") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{folder / 'config.json'} names no model_type: it is no transformers model")
    return config


def transformers_module() -> Any:
    """The package transformers, quiet. Raises InputError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise missing_package("transformers", "llm", "language models") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _floats(
    name: str, unread_in: Path | None, dtype: str, device: str, trust: bool, **options: Any
) -> LanguageModel:
    """A float model of a folder or a Hub id; its weights stay in a folder where one is given and that can be."""
    tokenizer = tokenizer_of(name, **options)
    if (
        unread_in is not None
        and device == "cpu"
        and not {"auto_map", "quantization_config"} & read_config(unread_in).keys()
    ):
        from rlquant.llm.unread import open_unread

        unread = open_unread(unread_in, dtype)
        if unread is not None:
            return LanguageModel(unread.model, tokenizer, name, dtype, unread=unread)
    model = _pretrained(name, dtype, trust, **options)
    return LanguageModel(model.to(device), tokenizer, name, dtype)


def _pretrained(name: str, dtype: str, trust: bool, **options: Any) -> Any:
    transformers = transformers_module()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype=DTYPES[dtype],
            trust_remote_code=trust,
            use_safetensors=None if trust else True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{name} cannot be loaded as a causal language model: {first}") from None
    if found["missing_keys"]:  # transformers fills them with random numbers
        raise InputError(f"{name} is incomplete: the tensor {min(found['missing_keys'])} is missing")
    return model.eval()


def tokenizer_of(name: str, **options: Any) -> Any:
    """The tokenizer, or None where there is none."""
    try:
        return transformers_module().AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_hub(source: str, dtype: str, device: str, trust: bool, lazy: bool) -> LanguageModel:
    if not is_hub_id(source):
        raise InputError(f"{source} is no file or folder, and no Hub id such as Qwen/Qwen2.5-0.5B either")
    name, _, revision = source.partition("@")
    options = {"revision": revision} if revision else {}
    folder = _hub_folder(name, **options) if lazy else None
    return _floats(name, folder, dtype, device, trust, **options).but(source=source)


def _hub_folder(name: str, **options: Any) -> Path | None:
    """Where the Hub's cache keeps a model, which is downloaded if it is not there; None without safetensors."""
    transformers_module()
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    from rlquant.llm.checkpoints.shards import INDEX
    from rlquant.llm.folders import WEIGHTS

    def found(file: str) -> str | None:
        path: str | None = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        return path

    try:
        config, _ = found("config.json"), found("generation_config.json")
        if config is None:
            return None
        if found(WEIGHTS) is None:
            index = found(INDEX)
            if index is None:
                return None
            get_checkpoint_shard_files(name, index, **options)
    except (OSError, ValueError):
        return None  # what from_pretrained says about it
    return Path(config).parent


def _gguf_file(path: Path) -> Path | None:
    if path.suffix == ".gguf":
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "config.json").exists() else []
    if len(files) > 1:
        raise InputError(
            f"{path} holds several .gguf files: name one of {', '.join(file.name for file in files)}"
        )
    return files[0] if files else None


def _from_gguf(path: Path, dtype: str, device: str) -> LanguageModel:
    """What a GGUF file stores is dequantized; its own precision is not kept."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise missing_package("gguf", "llm", "GGUF files") from None
    folder, name = str(path.parent), {"gguf_file": path.name}
    with redirect_stderr(StringIO()):  # its progress bar
        loaded = _pretrained(folder, dtype, trust=False, **name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # says that it cannot be saved, though nothing in it is quantized now
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.model.rotary_emb = loaded.model.rotary_emb  # its buffers are in no state dict
    model.tie_weights()
    model.generation_config = loaded.generation_config
    digest = file_hash(path)
    return LanguageModel(
        model.eval().to(device), tokenizer_of(folder, **name), str(path), dtype, sha256=digest
    )


def _from_checkpoint(path: Path, quantized: dict[str, Any], dtype: str, device: str) -> LanguageModel:
    method = str(quantized.get("quant_method", ""))
    if method not in _READERS:
        raise InputError(
            f"{path} was quantized by {method or 'an unknown method'}, which is not read; "
            f"these are: {', '.join(_READERS)}"
        )
    from rlquant.llm.checkpoints import read_checkpoint

    return read_checkpoint(path, dtype=dtype, device=device).but(sha256=_weights_hash(path))


def _weights_hash(folder: Path) -> str:
    return file_hash(*sorted(folder.glob("*.safetensors")))
