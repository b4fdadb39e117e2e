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
from rlquant.llm.model import decoder_of
from rlquant.quant import device_of

__all__ = ["Decoder", "State", "StaticCache"]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class StaticCache:
    """Keys and values of every layer.

    Attributes:
        keys, values: ``[layers, slots, kv heads, length, head size]``; a sequence has a slot, a token a place in it.
    """

    keys: Tensor
    values: Tensor

    @property
    def slots(self) -> int:
        """Sequences that it holds."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens of a sequence that it holds."""
        return self.keys.shape[3]

    def copy_(self, source: int, slots: list[int], length: int) -> None:
        """Let slots begin as another does: the prompt that several completions share."""
        for each in (self.keys, self.values):
            each[:, slots, :, :length] = each[:, source : source + 1, :, :length]


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

    def embedded(self, ids: Tensor) -> Tensor:
        """``[..., size]``."""
        found: Tensor = self._decoder.embed_tokens(ids).to(self.dtype)
        return found

    def turn(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, ``[batch, tokens, head size]`` in the dtype of ``like``."""
        found: tuple[Tensor, Tensor] = self._decoder.rotary_emb(like, position_ids=positions)
        return found

    def cache(self, slots: int, length: int) -> StaticCache:
        """An empty cache in the dtype of the hidden states."""
        heads, size = self.model.config.num_key_value_heads, self.layers[0].self_attn.head_dim
        shape = (len(self.layers), slots, heads, length, size)
        keys = torch.zeros(shape, dtype=self.dtype, device=device_of(self.model))
        return StaticCache(keys, torch.zeros_like(keys))

    def cache_bytes(self, length: int) -> int:
        """Of a slot."""
        heads, size = self.model.config.num_key_value_heads, self.layers[0].self_attn.head_dim
        return int(2 * len(self.layers) * heads * length * size * self.dtype.itemsize)

    @torch.no_grad()
    def hidden(
        self, ids: Tensor, positions: Tensor, cache: StaticCache, slots: Tensor | None, reach: int
    ) -> Tensor:
        """Hidden states of tokens, which are put into the cache; each sees its slot up to itself.

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
        batch = len(ids)
        rows = torch.arange(batch, device=ids.device) if slots is None else slots
        places = (rows[:, None], slice(None), positions)  # where new keys and values go
        seen = (slice(batch) if slots is None else slots, slice(None), slice(reach))
        for number, block in enumerate(decoder.layers):
            kept = (cache.keys[number], cache.values[number])
            mixed = _attend(block.self_attn, block.input_layernorm(hidden), turn, visible, kept, places, seen)
            hidden = hidden + mixed
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        normed: Tensor = decoder.norm(hidden)
        return normed

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[..., vocabulary]``."""
        found: Tensor = self.model.get_output_embeddings()(hidden)
        return found.float()


def _attend(
    part: Any,
    hidden: Tensor,
    turn: tuple[Tensor, Tensor],
    visible: Tensor,
    kept: tuple[Tensor, Tensor],
    places: tuple[Any, ...],
    seen: tuple[Any, ...],
) -> Tensor:
    """Grouped-query attention of one block (Ainslie et al. 2023, arXiv:2305.13245).

    ``kept`` are its cached keys and values; ``places`` index the new ones' there, ``seen`` those that are read.
    """
    batch, tokens, _ = hidden.shape
    split = (batch, tokens, -1, part.head_dim)
    query, key, value = (project(hidden).view(split) for project in (part.q_proj, part.k_proj, part.v_proj))
    if hasattr(part, "q_norm"):
        query, key = part.q_norm(query), part.k_norm(key)
    query, key = (_turned(each, *turn) for each in (query, key))
    for cached, new in zip(kept, (key, value), strict=True):
        cached[places] = new
    keys, values = (cached[seen] for cached in kept)
    if tokens == 1:
        mixed = _one_token(query[:, 0], keys, values, visible[:, 0], part.scaling)
    else:
        mixed = _many_tokens(query, keys, values, visible, part.scaling)
    projected: Tensor = part.o_proj(mixed.reshape(batch, tokens, -1))
    return projected


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of ``[batch, tokens, heads, size]``, in halves as Llama's."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def _one_token(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """``[batch, heads, size]``: all query heads of a group read its keys once, which are not repeated for them."""
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
