"""A quantized KV cache: keys per channel, values per token, the recent tokens as the model made them.

The layout is KIVI's (Liu et al. 2024, arXiv:2402.02750). A few channels of the keys are large at every token,
so ``group_size`` consecutive tokens of one channel share a scale; values have no such channels, so
``group_size`` channels of one token share one. At least the last ``window`` tokens stay in the model's dtype:
tokens leave the window a whole group at a time, so between ``window`` and ``window + group_size - 1`` are held
exactly and every older one is quantized, once, from its exact value. What is quantized depends on the number
of tokens in the cache alone, not on how many came at once.

A group stores packed codes, a 16-bit scale and, for integers, a 16-bit offset (``kv_groups.py``). Bits per
value at the default group of 32: int4 5, fp8_e4m3 8.5, int8 9 (:func:`stored_bits`).

Keys arrive after the rotary embedding, because that is what transformers gives to a cache. Rotation mixes two
channels over the tokens of a group; that costs the fast-turning pairs some of their common range, and nothing
has to be rotated again when the cache is read.

A forward attends to its own tokens exactly and to older ones as they are stored. A prompt that is prefilled in
one forward is therefore read exactly and quantized afterwards, as in KIVI, and so one forward over a text says
nothing about the cache: evaluate with :func:`forward_through_cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from rlquant.errors import InputError, unknown_name
from rlquant.llm.kv_groups import PackedStates, per_channel, per_token
from rlquant.quant.formats import Format, get_format, unsigned

__all__ = ["GROUP_SIZE", "KV_SCHEMES", "WINDOW", "QuantizedCache", "forward_through_cache", "stored_bits"]

GROUP_SIZE = 32
WINDOW = 128

KV_SCHEMES: dict[str, Format] = {
    "int8": unsigned(8),
    "int4": unsigned(4),
    "fp8_e4m3": get_format("fp8_e4m3"),
}


def stored_bits(scheme: str, group_size: int = GROUP_SIZE) -> float:
    """Bits that a quantized key or value takes, its share of scale and offset included; before anything loads.

    Raises InputError for a scheme that is not among :data:`KV_SCHEMES`.
    """
    fmt = _kv_format(scheme)
    return fmt.bits + (16 if fmt.signed else 32) / group_size


class QuantizedCache(Cache):
    """A transformers ``Cache`` that holds all but the recent tokens quantized.

    For ``model.generate(..., past_key_values=cache)`` and ``model(ids, past_key_values=cache, use_cache=True)``
    of decoders whose layers all attend to every earlier token (Llama, Qwen2 and their like, grouped-query
    attention included). Batches, left padding, beams, ``crop`` and ``reset`` work as with ``DynamicCache``.
    Reading a layer rebuilds that layer's keys and values in the model's dtype for the time of its attention;
    the other layers stay packed.

    ``crop`` into what is quantized keeps the rounded values: a rollback leaves a trace, so ``is_croppable`` is
    False (cutting the recent tokens is exact).

    :param config: the model's config.
    :param scheme: ``int8``, ``int4`` or ``fp8_e4m3``.
    :param group_size: values that share a scale; divides the head dimension. By default 32, or the head dimension
        where that is smaller.
    :param window: tokens kept exact at the least, a multiple of ``group_size``; 0 is allowed.
    :raises InputError: an unknown scheme; sizes that do not divide; a model with sliding or linear attention.
        While in use: keys or values that are not finite, or too large for a 16-bit scale.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        scheme: str = "int8",
        group_size: int | None = None,
        window: int = WINDOW,
    ) -> None:
        fmt = _kv_format(scheme)
        if group_size is None:
            group_size = min(GROUP_SIZE, _head_dim(config))
        _check_sizes(_head_dim(config), fmt, group_size, window)
        self.scheme, self.group_size, self.window = scheme, group_size, window
        full = DynamicCache(config=config).layers  # transformers says which kind of cache each layer needs
        if other := sorted({type(layer).__name__ for layer in full if type(layer) is not DynamicLayer}):
            raise InputError(
                f"a quantized KV cache needs layers that attend to every earlier token; this "
                f"{config.model_type} model also needs {', '.join(other)}: leave its KV cache unquantized"
            )
        super().__init__(layers=[_QuantizedLayer(fmt, group_size, window, i) for i in range(len(full))])

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, offsets and the exact recent tokens of every layer."""
        return sum(tensor.untyped_storage().nbytes() for layer in self._states for tensor in layer.tensors())

    @property
    def bits_per_value(self) -> float:
        """Bits held per key and value cached, the exact recent tokens included; 0 while the cache is empty.

        Falls towards :func:`stored_bits` as the text grows past the window.
        """
        values = sum(layer.value_count() for layer in self._states)
        return 8 * self.nbytes / values if values else 0.0

    @property
    def _states(self) -> list[_QuantizedLayer]:
        return [layer for layer in self.layers if isinstance(layer, _QuantizedLayer)]


@torch.no_grad()
def forward_through_cache(
    model: Any, ids: Tensor, cache: Cache, chunk: int = GROUP_SIZE, attention_mask: Tensor | None = None
) -> Tensor:
    """Logits of a text as if it were decoded token by token through ``cache``, which may be any of transformers.

    For a model without its head they are the last hidden states.

    A forward takes ``chunk`` tokens. With a :class:`QuantizedCache` whose group size is a multiple of
    ``chunk``, every token attends to exactly what it would attend to alone: tokens leave the window at
    multiples of the group size, which is where chunks end. (Logits equal up to the float order of larger
    products.) For a fair reference pass a ``DynamicCache`` with the same chunk.

    :param ids: int64 ``[batch, tokens]``, the tokens that follow those in the cache.
    :param attention_mask: int64 ``[batch, cached + tokens]``, 0 at left padding; positions are counted from it.
    :return: ``[batch, tokens, vocabulary]`` (or ``hidden``) in the model's dtype.
    :raises InputError: no tokens; a chunk that does not divide the group size.
    """
    group_size = cache.group_size if isinstance(cache, QuantizedCache) else chunk
    if chunk < 1 or group_size % chunk:
        raise InputError(
            f"chunk {chunk} does not divide the cache's group size {group_size}: tokens would attend to others "
            f"that decoding has quantized by then; take chunk={group_size}"
        )
    if ids.shape[1] == 0:
        raise InputError(
            "there are no tokens to send through the cache: ids has shape " + str(list(ids.shape))
        )
    first = cache.get_seq_length()
    start, end, logits = first, first + ids.shape[1], []
    while start < end:
        stop = min(end, start + chunk - start % chunk)
        padding = {}
        if attention_mask is not None:
            seen = attention_mask[:, :stop]
            positions = (seen.cumsum(dim=1) - 1).clamp_(min=0)
            padding = {"attention_mask": seen, "position_ids": positions[:, start:]}
        part = ids[:, start - first : stop - first]
        output = model(part, past_key_values=cache, use_cache=True, **padding)
        logits.append(output.logits if hasattr(output, "logits") else output.last_hidden_state)
        start = stop
    return torch.cat(logits, dim=1)


class _QuantizedLayer(DynamicLayer):
    """The cache of one layer; ``keys`` and ``values`` are the exact recent tokens, as ``DynamicLayer``'s are."""

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self, fmt: Format, group_size: int, window: int, index: int) -> None:
        super().__init__()
        self.group_size, self.window = group_size, window
        self._old_keys = PackedStates(fmt, group_size, per_channel, f"the keys of layer {index}")
        self._old_values = PackedStates(fmt, group_size, per_token, f"the values of layer {index}")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Values may be narrower than keys (latent attention), which a config names in many ways.
        _check_sizes(value_states.shape[3], self._old_values.fmt, self.group_size, self.window)
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens; return all keys and values for the forward that brings them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        attended = self._all()
        self._retire()
        return attended

    def _all(self) -> tuple[Tensor, Tensor]:
        """Every key and value in the model's dtype: ``[batch, heads, tokens, channels]`` each."""
        return _joined(self._old_keys, self.keys), _joined(self._old_values, self.values)

    def _retire(self) -> None:
        """Quantize the whole groups that are older than the window."""
        count = (self.keys.shape[2] - self.window) // self.group_size * self.group_size
        if count > 0:
            self._old_keys.append(self.keys[:, :, :count])
            self._old_values.append(self.values[:, :, :count])
            # Cloned: a view would keep the memory of the tokens that have gone.
            self.keys, self.values = self.keys[:, :, count:].clone(), self.values[:, :, count:].clone()

    def get_seq_length(self) -> int:
        return self._old_keys.tokens + (self.keys.shape[2] if self.is_initialized else 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens (a negative number, as transformers gives it)."""
        if tokens_to_remove > 0:
            raise InputError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        left = max(0, self.get_seq_length() + tokens_to_remove)
        whole = self._old_keys.tokens
        keys, values = self.keys, self.values
        if left < whole:  # the rest of a group that is cut is kept as the rounded values it has become
            keys, values = self._all()
            whole = left // self.group_size * self.group_size
            self._old_keys.truncate(whole)
            self._old_values.truncate(whole)
            keys, values = keys[:, :, whole:], values[:, :, whole:]
        self.keys, self.values = keys[:, :, : left - whole].clone(), values[:, :, : left - whole].clone()

    def reset(self) -> None:
        self.keys = self.values = torch.empty(0)
        self.is_initialized = False
        self._old_keys.truncate(0)
        self._old_values.truncate(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change_batch(lambda t: t[indices.to(t.device)])

    def _change_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self._old_keys.change_batch(change)
            self._old_values.change_batch(change)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        if not self.is_initialized:
            return []
        packed = [old.groups for old in (self._old_keys, self._old_values) if old.groups is not None]
        return [self.keys, self.values, *(tensor for groups in packed for tensor in groups.tensors())]

    def value_count(self) -> int:
        """Keys and values cached, in numbers."""
        if not self.is_initialized:
            return 0
        batch, heads, _, channels = self.keys.shape
        return batch * heads * (channels + self.values.shape[3]) * self.get_seq_length()


def _joined(old: PackedStates, recent: Tensor) -> Tensor:
    if old.tokens == 0:
        return recent
    batch, heads, tokens, channels = recent.shape
    x = recent.new_empty(batch, heads, old.tokens + tokens, channels)
    old.read_into(x)
    x[:, :, old.tokens :] = recent
    return x


def _kv_format(scheme: str) -> Format:
    if scheme not in KV_SCHEMES:
        raise unknown_name("KV-cache scheme", scheme, KV_SCHEMES)
    return KV_SCHEMES[scheme]


def _head_dim(config: PreTrainedConfig) -> int:
    decoder = config.get_text_config(decoder=True)
    return int(getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads)


def _check_sizes(head_dim: int, fmt: Format, group_size: int, window: int) -> None:
    usable = [n for n in range(1, head_dim + 1) if head_dim % n == 0 and n * fmt.bits % 8 == 0]
    if group_size not in usable:
        raise InputError(
            f"group size {group_size} does not divide the head dimension {head_dim} of this model into groups "
            f"of whole bytes; choose one of {', '.join(map(str, usable))}"
        )
    if window < 0 or window % group_size:
        raise InputError(
            f"window {window} is not a multiple of the group size {group_size}: tokens leave it a group at a "
            f"time; choose {max(1, round(window / group_size)) * group_size}, say, or 0"
        )
