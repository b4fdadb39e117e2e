"""A causal language model and what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import Link, device_of

if TYPE_CHECKING:
    from rlquant.llm.unread import UnreadWeights

__all__ = ["LanguageModel", "block_links", "decoder_blocks", "decoder_of"]


@dataclass(frozen=True)
class LanguageModel:
    """A language policy.

    Attributes:
        model: a transformers causal LM (``PreTrainedModel``).
        tokenizer: its tokenizer; None where the source has none.
        source: where it came from.
        precision: ``fp32``, ``bf16``, ``fp16`` or the name of a scheme.
        method: how it was quantized; ``none`` for floats.
        sha256: of the weight files, in hexadecimal; empty where the source is no local file.
        unread: float weights that are still in their files, on the meta device in ``model``; None where there are
            none.
    """

    model: Any
    tokenizer: Any
    source: str
    precision: str
    method: str = "none"
    sha256: str = ""
    unread: UnreadWeights | None = None

    @property
    def parameters(self) -> int:
        """How many weights its float form has, a tied matrix counted once."""
        return sum(count for _, count in _weights(self.model))

    @property
    def device(self) -> Any:
        """Where its inputs belong."""
        return device_of(self.model) if self.unread is None else torch.device("cpu")

    def read_(self, part: nn.Module, name: str = "") -> None:
        """See to it that a part of the model, of this name there, is in memory."""
        if self.unread is not None:
            self.unread.read_(part, name)

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(self.model.config.vocab_size)

    @property
    def longest(self) -> int:
        """The most tokens it was made for."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31))

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, without anything added at its ends. Raises InputError where it has no tokenizer."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.source} has no tokenizer, so it cannot read text: add tokenizer.json to it"
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def but(self, **changes: Any) -> LanguageModel:
        """A copy with other fields."""
        return replace(self, **changes)


def _weights(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Name and number of weights of each matrix or vector, those that layers share once."""
    from rlquant.quant import QuantizedWeight

    seen: set[int] = set()
    for name, part in model.named_modules():
        if isinstance(part, QuantizedWeight):
            if id(part) not in seen:
                yield name, math.prod(part.shape)
            seen.add(id(part))
            continue
        for key, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in seen:
                yield f"{name}.{key}", parameter.numel()
            seen.add(id(parameter))
        bias = part._buffers.get("bias")
        if bias is not None:
            yield f"{name}.bias", bias.numel()


def decoder_of(model: Any) -> Any:
    """The part below the head, which has ``embed_tokens``, ``layers`` and ``norm``.

    Raises:
        InputError: the architecture is laid out otherwise.
    """
    decoder = getattr(model, "model", None)
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm")):
        raise InputError(
            f"{type(model).__name__} is not laid out as Llama, Qwen, Mistral or SmolLM2 are (model.embed_tokens, "
            "model.layers, model.norm), so its blocks cannot be quantized one by one"
        )
    return decoder


def decoder_blocks(model: Any) -> list[nn.Module]:
    """The transformer blocks, from the first to the last. Raises InputError as :func:`decoder_of`."""
    return list(decoder_of(model).layers)


def block_links(block: nn.Module) -> list[Link]:
    """Where scales of input channels can be folded in a block of a Llama-like decoder; names within the block.

    Norms into the projections that read them, and ``up_proj`` into ``down_proj`` (the gate is multiplied in
    after the activation, so a factor passes). Values into ``o_proj`` where each head has its own.
    """
    parts = dict(block.named_modules())
    attention, mlp = "self_attn", "mlp"
    links = [
        Link("input_layernorm", tuple(f"{attention}.{name}_proj" for name in "qkv")),
        Link("post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj")),
        Link(f"{mlp}.up_proj", (f"{mlp}.down_proj",)),
    ]
    values, output = (parts.get(f"{attention}.{name}_proj") for name in "vo")
    sizes = [getattr(values, "out_features", 0), getattr(output, "in_features", 0)]
    if sizes[0] == sizes[1] > 0:
        links.append(Link(f"{attention}.v_proj", (f"{attention}.o_proj",)))
    # A norm that adds one to its weight (Gemma's) does not scale as others do.
    plain = [link for link in links if not type(parts.get(link.producer)).__name__.startswith("Gemma")]
    return [link for link in plain if all(name in parts for name in (link.producer, *link.consumers))]
