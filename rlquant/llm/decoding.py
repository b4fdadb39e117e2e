"""The forward pass of Llama-style decoders over a cache that never moves: what a rollout repeats for every token.

transformers' ``generate`` grows its cache, makes masks and checks its arguments at every step, and on a small model the
GPU waits for that. Here a step reads and writes tensors of fixed place and shape, with the model's own layers, so the
weights, packed or not, and the adapters are those that train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlquant.errors import InputError
from rlquant.llm.adapters import base_model
from rlquant.llm.decode.cache import StaticCache, cache_bytes
from rlquant.llm.model import decoder_of
from rlquant.quant import device_of

__all__ = ["Decoder", "State"]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class State:
    """What a step reads and writes of every slot, int64 ``[slots]``.

    Attributes:
        tokens: the last of each sequence, which is not in the cache yet.
        positions: theirs.
        seeds: of the sequences.
        places: of the next tokens among those that are sampled.
    """

    tokens: Tensor
    positions: Tensor
    seeds: Tensor
    places: Tensor

    @classmethod
    def of(cls, slots: int, device: torch.device) -> State:
        """Zeros."""
        return cls(*(torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4)))


class Decoder:
    """A model of the Llama, Mistral, Qwen2 or Qwen3 family, with its adapters as they act.

    Raises:
        InputError: another architecture, or one whose attention sees a window only.
    """

    def __init__(self, model: Any) -> None:
        self.model = base_model(model)
        config = self.model.config
        if config.model_type not in _FAMILIES:
            raise InputError(
                f"there are no rollouts for the architecture {config.model_type!r}: "
                f"{', '.join(_FAMILIES)} have them, and transformers' generate serves all"
            )
        self._decoder = decoder_of(self.model)
        if getattr(config, "sliding_window", None) is not None:
            raise InputError(
                f"there are no rollouts for a {config.model_type} with a sliding window: use generate"
            )

    @property
    def layers(self) -> Any:
        """The blocks."""
        return self._decoder.layers

    @property
    def norm(self) -> Any:
        """The last one, before the head."""
        return self._decoder.norm

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states."""
        dtype: torch.dtype = self._decoder.norm.weight.dtype
        return dtype

    @property
    def embeddings(self) -> Any:
        """The layer."""
        return self._decoder.embed_tokens

    def embedded(self, ids: Tensor) -> Tensor:
        """``[..., size]``."""
        found: Tensor = self.embeddings(ids).to(self.dtype)
        return found

    def turn(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, ``[batch, tokens, head size]`` in the dtype of ``like``."""
        found: tuple[Tensor, Tensor] = self._decoder.rotary_emb(like, position_ids=positions)
        return found

    def cache(self, slots: int, length: int, scheme: str | None = None) -> StaticCache:
        """An empty cache, quantized or in the dtype of the hidden states."""
        heads, size = self.model.config.num_key_value_heads, self.layers[0].self_attn.head_dim
        shape = (len(self.layers), slots, heads, length, size)
        return StaticCache.empty(shape, self.dtype, device_of(self.model), scheme)

    def cache_bytes(self, length: int, scheme: str | None = None) -> int:
        """Of a slot."""
        heads, size = self.model.config.num_key_value_heads, self.layers[0].self_attn.head_dim
        return cache_bytes(len(self.layers) * heads * length, size, self.dtype.itemsize, scheme)

    @torch.no_grad()
    def hidden(
        self, ids: Tensor, positions: Tensor, cache: StaticCache, slots: Tensor | None, reach: int
    ) -> Tensor:
        """Hidden states of tokens, which are put into the cache; each sees its slot up to itself.

        Several tokens of a sequence are its first, and see each other exactly, whatever the cache makes of them.

        Args:
            ids, positions: int64 ``[batch, tokens]``; padding may follow a sequence, and its places in the cache are
                written again when the sequence comes to them.
            cache: is written to.
            slots: int64 ``[batch]``; None for the first so many, which are read in place.
            reach: no position that counts is as large.

        Returns:
            ``[batch, tokens, size]``, after the last norm.
        """
        decoder = self._decoder
        hidden = self.embedded(ids)
        turn = self.turn(hidden, positions)
        visible = torch.arange(reach, device=ids.device) <= positions[..., None]  # [batch, tokens, reach]
        rows = torch.arange(len(ids), device=ids.device) if slots is None else slots
        seen = slice(len(ids)) if slots is None else slots
        for number, block in enumerate(decoder.layers):
            part = block.self_attn
            query, key, value = _projected(part, block.input_layernorm(hidden), turn)
            cache.write(number, rows[:, None], positions, key, value)
            if ids.shape[1] == 1:
                keys, values = cache.read(number, seen, reach)
                if cache.scheme is not None:  # a token sees itself exactly
                    places = torch.arange(len(ids), device=ids.device)
                    for each, new in ((keys, key), (values, value)):
                        each[places, :, positions[:, 0]] = new[:, 0]
                mixed = _one_token(query[:, 0], keys, values, visible[:, 0], part.scaling)
            else:
                mixed = _many_tokens(query, key.transpose(1, 2), value.transpose(1, 2), visible, part.scaling)
            hidden = hidden + part.o_proj(mixed.reshape(*ids.shape, -1))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        normed: Tensor = decoder.norm(hidden)
        return normed

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[..., vocabulary]``."""
        found: Tensor = self.model.get_output_embeddings()(hidden)
        return found.float()


def _projected(part: Any, hidden: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys at their positions, and values; ``[batch, tokens, heads, head size]``."""
    split = (*hidden.shape[:-1], -1, part.head_dim)
    query, key, value = (project(hidden).view(split) for project in (part.q_proj, part.k_proj, part.v_proj))
    if hasattr(part, "q_norm"):
        query, key = part.q_norm(query), part.k_norm(key)
    return _turned(query, *turn), _turned(key, *turn), value


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of ``[batch, tokens, heads, size]``, in halves as Llama's."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def _one_token(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), ``[batch, heads, size]``.

    All query heads of a group read its keys once, which are not repeated for them.
    """
    batch, kv_heads, _, size = keys.shape
    grouped = query.view(batch, kv_heads, -1, size)
    scores = (grouped @ keys.transpose(-1, -2)).float() * scaling
    weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(dim=-1)
    return (weights.to(values.dtype) @ values).reshape(batch, -1, size)


def _many_tokens(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """``[batch, tokens, heads, size]``."""
    group = query.shape[2] // keys.shape[1]
    keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=visible[:, None], scale=scaling
    )
    return mixed.transpose(1, 2)
