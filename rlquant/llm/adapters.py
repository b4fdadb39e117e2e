"""LoRA adapters on an immutable, packed base: made, saved and loaded as PEFT's, trained in float32.

Hu et al. 2021 (LoRA), Dettmers et al. 2023 (QLoRA), Kalajdzievski 2023 (rsLoRA), Liu et al. 2024 (DoRA).

>>> model = add_adapter(lm.model, "policy", AdapterSettings(rank=16))          # doctest: +SKIP
>>> optimizer = torch.optim.AdamW(adapter_parameters(model, "policy").values(), 1e-5)  # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rlquant.config import Section
from rlquant.errors import InputError, missing_package, unknown_name
from rlquant.llm.model import decoder_blocks
from rlquant.quant import QuantLinear
from rlquant.runs import write_files

__all__ = [
    "AdapterSettings",
    "active_adapter",
    "adapter_parameters",
    "add_adapter",
    "base_hash",
    "base_model",
    "checkpoint_blocks_",
    "load_adapter",
    "lora_config",
    "save_adapter",
    "tensors_hash",
    "use_adapter",
]

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class AdapterSettings(Section):
    """What an adapter is."""

    rank: int = Field(16, ge=1, description="of the product that is added to a layer's weight")
    alpha: float = Field(
        32.0, gt=0, description="the product is scaled by alpha / rank, or alpha / sqrt(rank) where rslora"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of a layer's inputs that it does not see in training"
    )
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="the linear layers of the blocks (never the output layer), or their last names: [q_proj, v_proj]",
    )
    dora: bool = Field(
        False, description="train the magnitude of each row apart from its direction (Liu et al. 2024)"
    )
    rslora: bool = Field(False, description="see alpha (Kalajdzievski 2023)")
    init: Literal["zero", "loftq"] = Field(
        "zero",
        description="loftq starts as what quantization lost: the base alone is not where training starts",
    )
    seed: int = Field(0, description="of the initial values; together with the adapter's name")


def add_adapter(
    model: Any, name: str, settings: AdapterSettings, *, weights: Mapping[str, Tensor] | None = None
) -> Any:
    """Put an adapter on a causal LM, whose base is frozen from then on; trainable, float32.

    The first adapter is active; :func:`use_adapter` changes that.

    Args:
        model: a transformers causal LM, quantized or not, or what this function returned (for one more adapter).
        name: of the adapter.
        settings: what it is.
        weights: float weights ``[out, in]`` by name (``model.layers.0.self_attn.q_proj.weight``), such as the state
            dict of the float model; for ``init="loftq"``.

    Returns:
        A ``PeftModel``.

    Raises:
        InputError: a target is unknown, the name is taken, peft is not installed, or weights are missing.
    """
    config = lora_config(model, settings)
    if settings.init == "loftq" and weights is None:
        raise InputError("init loftq starts from what quantization lost: give the float weights too")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed + zlib.crc32(name.encode()))
        model = _attach(model, name, config)
    if settings.init == "loftq":
        from rlquant.llm.loftq import init_loftq_

        assert weights is not None
        init_loftq_(model, name, weights)
    return model


def lora_config(model: Any, settings: AdapterSettings) -> Any:
    """PEFT's configuration of an adapter for a model, for trainers that put it on themselves.

    Raises:
        InputError: a target is unknown, DoRA cannot be, or peft is not installed.
    """
    from rlquant.llm.adapter_layer import BASE_LAYERS, AdapterLinear

    config = _peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.targets),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        task_type="CAUSAL_LM",
    )
    if settings.dora:
        _refuse_dora(model)
    config._register_custom_module(dict.fromkeys(BASE_LAYERS, AdapterLinear))
    return config


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by their names in the model.

    Raises:
        InputError: there is no such adapter.
    """
    found = {key: each for key, each in model.named_parameters() if _adapter_of(key) == name}
    if not found:
        raise unknown_name("adapter", name, getattr(model, "peft_config", {}))
    return found


def base_model(model: Any) -> Any:
    """The transformers model that adapters lie on; a model without adapters is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def use_adapter(model: Any, name: str | None) -> None:
    """Let one adapter act, or none (the base). Every adapter stays as trainable as it was.

    PEFT's own ``set_adapter`` freezes all others, so that a backward pass through two of them loses one.
    """
    if name is not None and name not in model.peft_config:
        raise unknown_name("adapter", name, model.peft_config)
    for _, layer in _layers(model):
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]


@contextmanager
def active_adapter(model: Any, name: str | None) -> Iterator[None]:
    """:func:`use_adapter` for a while."""
    before = _acting(model)
    use_adapter(model, name)
    try:
        yield
    finally:
        use_adapter(model, before)


def checkpoint_blocks_(model: Any) -> None:
    """Recompute each block in the backward pass instead of keeping what is inside; only while ``training``.

    A block is recomputed with the adapter of its forward pass, whichever is active by then, so losses of several
    adapters may be added up before one backward pass. A block that is itself in training mode is checkpointed though
    the layers inside it, dropout among them, are in evaluation mode.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), active_adapter(model, _acting(model))

    base = base_model(model)
    options = {"use_reentrant": False, "context_fn": contexts}
    if hasattr(base, "activation_checkpointing_enable"):  # transformers 5.24
        base.activation_checkpointing_enable(options)
    else:
        base.gradient_checkpointing_enable(options)


def save_adapter(model: Any, name: str, folder: str | Path) -> None:
    """Write one adapter as PEFT does: ``PeftModel.from_pretrained(original_model, folder)`` loads it.

    The weights come first and ``adapter_config.json`` last, so a folder with it is whole.

    Raises:
        InputError: there is no such adapter, or the folder cannot be written to.
    """
    from safetensors.torch import save

    if name not in model.peft_config:
        raise unknown_name("adapter", name, model.peft_config)
    state = _peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()}
    config = {**model.peft_config[name].to_dict(), "inference_mode": True}
    document = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (Path(folder) / _CONFIG).unlink(missing_ok=True)
    text = json.dumps(document, indent=2, sort_keys=True, default=str)
    write_files(folder, {_WEIGHTS: save(held, {"format": "pt"}), _CONFIG: text})


def load_adapter(model: Any, name: str, folder: str | Path, *, trainable: bool = False) -> Any:
    """Put a saved adapter on a causal LM under a name of its own; float32.

    Args:
        model: as in :func:`add_adapter`.
        name: of the adapter from now on.
        folder: written by :func:`save_adapter` or by PEFT.
        trainable: whether it will be trained on.

    Raises:
        InputError: the folder holds no LoRA adapter, it is damaged, or it does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, peft = Path(folder), _peft()
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise InputError(f"{path} holds no {file}: it is no finished adapter")
    try:
        config = peft.LoraConfig.from_pretrained(str(path))
        tensors = load_file(path / _WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"the adapter in {path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(config, peft.LoraConfig):
        raise InputError(f"{path} holds a {config.peft_type} adapter; LoRA adapters are read")
    config.base_model_name_or_path = None  # a name: the model that is at hand counts
    model = _attach(model, name, config)
    try:
        result = peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
    except RuntimeError as error:
        raise InputError(
            f"the adapter in {path} does not fit this model: {str(error).splitlines()[-1]}"
        ) from None
    own = adapter_parameters(model, name)
    lacking = [key for key in result.missing_keys if key in own]
    if lacking or result.unexpected_keys:
        raise InputError(
            f"the adapter in {path} does not fit this model: {(lacking or result.unexpected_keys)[0]} is missing "
            "or too many"
        )
    for parameter in own.values():
        parameter.requires_grad_(trainable)
    return model


def base_hash(model: nn.Module) -> str:
    """SHA-256 of the base, in hexadecimal: codes, scales and float parts with their names; adapters do not count.

    The same before an adapter is added and after; training leaves it as it is.
    """
    return tensors_hash(_base_tensors(model))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, in hexadecimal: names, dtypes, shapes and values, whatever their order and device."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise missing_package("peft", "llm", "adapters") from None
    return peft


def _layers(model: Any) -> list[Any]:
    """Found once: roles change with every forward pass, and a large model has thousands of modules."""
    from rlquant.llm.adapter_layer import adapter_layers

    kept = model.__dict__.get("_rlquant_layers")
    if kept is None:
        kept = model.__dict__["_rlquant_layers"] = list(adapter_layers(model))
    return list(kept)


def _acting(model: Any) -> str | None:
    _, layer = _layers(model)[0]
    return None if layer.disable_adapters else str(layer.active_adapters[0])


def _attach(model: Any, name: str, config: Any) -> Any:
    from rlquant.llm.adapter_layer import BASE_LAYERS, AdapterLinear, named_as_peft_does

    if name in getattr(model, "peft_config", {}):
        raise InputError(f"the model has an adapter {name!r} already")
    if not name.isidentifier() or name.startswith("lora_"):
        raise InputError(f"{name!r} is no name of an adapter: take letters, digits and _, such as policy")
    config._register_custom_module(dict.fromkeys(BASE_LAYERS, AdapterLinear))
    with named_as_peft_does(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
            model.__dict__.pop("_rlquant_layers", None)
        else:
            model = _peft().get_peft_model(model, config, adapter_name=name)
    for parameter in adapter_parameters(model, name).values():
        parameter.requires_grad_(True)
    return model


def _targets(model: Any, wanted: str | tuple[str, ...]) -> list[str]:
    """Last names of linear layers of the blocks."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from rlquant.llm.adapter_layer import BASE_LAYERS

    names: dict[str, None] = {}
    for block in decoder_blocks(base_model(model)):
        for name, part in block.named_modules():
            inner = "base_layer" in name or "lora_" in name
            if not inner and isinstance(part, (*BASE_LAYERS, BaseTunerLayer)):
                names[name.rpartition(".")[2]] = None
    if wanted == "all-linear":
        return list(names)
    for each in wanted:
        if each not in names:
            raise unknown_name("target of adapters", each, names)
    return list(wanted)


def _refuse_dora(model: nn.Module) -> None:
    """DoRA needs the norms of the whole weight, of which these layers keep a part elsewhere."""
    for name, part in model.named_modules():
        if isinstance(part, QuantLinear) and not (part.input_scale is None and part.outlier_index is None):
            raise InputError(
                f"{name} scales its inputs or keeps outliers apart, so DoRA cannot take the norms of its weight: "
                "quantize with rtn, clip, hqq or gptq, or take LoRA"
            )


def _adapter_of(parameter: str) -> str | None:
    """The adapter that a parameter belongs to, which its name gives after ``lora_A`` or the like."""
    parts = parameter.split(".")
    return next((after for part, after in pairwise(parts) if part.startswith("lora_")), None)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        key.removeprefix("base_model.model.").replace(".base_layer.", "."): value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) and _adapter_of(key) is None
    }
