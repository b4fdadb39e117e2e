"""The base of a fine-tuning run: loaded, quantized once, frozen; and the settings that all such recipes share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlquant.config import Section
from rlquant.devices import device_named
from rlquant.errors import InputError
from rlquant.llm.attention import avoid_cudnn_attention
from rlquant.llm.bitsandbytes import to_bitsandbytes_
from rlquant.llm.fused_blocks import fuse_blocks_
from rlquant.llm.load import DTYPES, load
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.quant import weight_bytes

__all__ = [
    "Backbone",
    "BaseSettings",
    "float_weights",
    "load_backbone",
    "prepare_tokenizer_",
    "token_counter",
]

_PADS = ("<|pad|>", "<pad>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|unk|>", "<unk>", "<|im_start|>")


class BaseSettings(Section):
    """Which base, and how it is kept."""

    shorthand: ClassVar[str | None] = "source"
    source: str = Field(
        "Qwen/Qwen2.5-0.5B", description="a transformers folder, GGUF file, artifact or Hub id"
    )
    precision: str = Field("nf4-dq", description="of the frozen weights: a scheme, or bf16, fp16, fp32")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="of products; auto: what the device has"
    )
    device: str = Field("auto", description="cpu, cuda or cuda:N; auto: a GPU where there is one")
    trust: bool = Field(False, description="run code that comes with the model, and read pickled weights")

    @property
    def on(self) -> torch.device:
        """Where everything computes. Raises InputError where there is no such device."""
        if self.device == "auto":
            local = os.environ.get("LOCAL_RANK")  # of accelerate and torchrun: a GPU for each process
            cuda = "cuda" if local is None else f"cuda:{local}"
            return torch.device(cuda if torch.cuda.is_available() else "cpu")
        return torch.device(device_named(self.device, also=("auto",)))

    @property
    def computes_in(self) -> str:
        """``bf16``, ``fp16`` or ``fp32``."""
        if self.dtype != "auto":
            return self.dtype
        if self.on.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@dataclass(frozen=True)
class Backbone:
    """The base of a run.

    Attributes:
        lm: the model on its device, every weight frozen.
        weights: bytes of its weights.
    """

    lm: LanguageModel
    weights: int


def load_backbone(settings: BaseSettings) -> Backbone:
    """The base on its device, quantized where ``precision`` says so, every weight frozen.

    On a GPU bitsandbytes computes with the codes that were chosen here; on a CPU our packed layers do.

    Raises:
        InputError: as :func:`~rlquant.llm.load.load`; the precision is unknown or needs calibration; the tokenizer has
            no token to pad with.
    """
    avoid_cudnn_attention()
    plan = None if settings.precision in DTYPES else Plan.parse(settings.precision)
    if plan is not None and plan.needs_calibration:
        raise InputError(
            f"model.precision = {settings.precision!r} needs calibration: take weights only, such as nf4-dq, or "
            "a model that 'rlquant quantize' made"
        )
    dtype = settings.precision if plan is None else settings.computes_in
    device = settings.on
    lm = load(settings.source, dtype=dtype, device="cpu" if plan else str(device), trust=settings.trust)
    if plan is not None and lm.method != "none":
        raise InputError(
            f"{settings.source} is quantized to {lm.precision} already: set model.precision={lm.precision}"
        )
    if plan is not None:
        lm = quantize_model_(lm, plan, device=device)
        lm.model.to(device)
    size = weight_bytes(lm.model)  # before another library keeps the codes in its own way
    if plan is not None and device.type == "cuda":
        to_bitsandbytes_(lm.model, DTYPES[dtype])
    lm.model.requires_grad_(False)
    if device.type == "cuda":
        fuse_blocks_(lm.model)
    prepare_tokenizer_(lm)
    return Backbone(lm, size)


def float_weights(settings: BaseSettings) -> dict[str, Tensor]:
    """The float weights that the base was quantized from, by name, on the CPU."""
    weights: dict[str, Tensor] = load(settings.source, dtype="fp32", trust=settings.trust).model.state_dict()
    return weights


def prepare_tokenizer_(lm: LanguageModel) -> None:
    """Give the tokenizer a token to pad with that is not its end of text: a model that never sees its end in a loss
    never learns to stop.

    Raises:
        InputError: there is no tokenizer, or no such token.
    """
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise InputError(f"{lm.source} has no tokenizer: add tokenizer.json to it")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        vocabulary = tokenizer.get_vocab()
        found = next((name for name in _PADS if name in vocabulary and name != tokenizer.eos_token), None)
        if found is None:
            raise InputError(
                f"the tokenizer of {lm.source} pads with its end of text, {tokenizer.eos_token!r}, and has none of "
                f"{', '.join(_PADS)} to pad with instead: set pad_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = found
        sys.stderr.write(
            f"rlquant: padding with {found!r}, since the end of text must stay visible to the loss\n"
        )
    lm.model.config.pad_token_id = tokenizer.pad_token_id
    lm.model.generation_config.pad_token_id = tokenizer.pad_token_id


def token_counter(lm: LanguageModel) -> Callable[[Any], int]:
    """How many tokens a text has, or a conversation by the model's chat template.

    Raises:
        InputError: when it meets a conversation and the model has no chat template.
    """

    def count(shown: Any) -> int:
        if isinstance(shown, str):
            return len(lm.tokens(shown))
        if getattr(lm.tokenizer, "chat_template", None) is None:
            raise InputError(
                f"{lm.source} has no chat template, and the data holds conversations: take an instruct model, or text"
            )
        return len(lm.tokens(lm.tokenizer.apply_chat_template(shown, tokenize=False)))

    return count
