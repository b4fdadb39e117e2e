"""Keys and values of many sequences in tensors that never move, as they are or quantized.

A quantized cache shares a scale, and for integers an offset, among half a head of one token: a token is quantized when
it comes, and never again. ``kv_cache.py`` has KIVI's finer layout for caches that grow, where a group of tokens shares
the scale of a key's channel, and tokens are kept back until their group is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rlquant.errors import InputError, unknown_name

__all__ = ["CACHES", "CacheScheme", "StaticCache", "cache_bytes"]

CacheScheme = Literal["fp8_e4m3", "int8", "int4"]

CACHES = {scheme: number for number, scheme in enumerate(get_args(CacheScheme), start=1)}
"""Schemes, and their numbers in ``attend_cuda.py``."""
_LEVELS = {"int8": 255, "int4": 15}
_LARGEST = 448.0
_LEAST = 2.0**-14
"""The least scale: float16's smallest normal number."""


@dataclass(frozen=True)
class StaticCache:
    """Keys and values of every layer.

    Attributes:
        keys, values: ``[layers, slots, kv heads, length, head size]``; a sequence has a slot, a token a place in it.
            Quantized: codes, for int4 half as many bytes, a value of the first half of a head in the low bits.
        key_scales, value_scales: float16 ``[layers, slots, kv heads, length, 2, 2]``: half of a head, scale and offset.
        scheme: among :data:`CACHES`, or None.
        dtype: of what is read.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor
    scheme: str | None
    dtype: torch.dtype

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        scheme: str | None,
    ) -> StaticCache:
        """Zeros.

        Raises:
            InputError: no such scheme, or heads that do not halve.
        """
        size = shape[-1]
        if scheme is not None and scheme not in CACHES:
            raise unknown_name("KV-cache scheme", scheme, CACHES)
        if scheme is not None and size % 2:
            raise InputError(f"a {scheme} cache needs heads of an even size, not {size}")
        kept = dtype if scheme is None else torch.float8_e4m3fn if scheme == "fp8_e4m3" else torch.uint8
        stored = (*shape[:-1], size // 2 if scheme == "int4" else size)
        scales = (*shape[:-1], 2, 2) if scheme else (0,)
        keys, values = (torch.zeros(stored, dtype=kept, device=device) for _ in range(2))
        key_scales, value_scales = (torch.zeros(scales, dtype=torch.float16, device=device) for _ in range(2))
        return cls(keys, values, key_scales, value_scales, scheme, dtype)

    @property
    def slots(self) -> int:
        """Sequences that it holds."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens of a sequence that it holds."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """That it takes."""
        return sum(each.nbytes for each in self._tensors())

    def copy_(self, source: int, slots: list[int], length: int) -> None:
        """Let slots begin as another does: the prompt that several completions share."""
        for each in self._tensors():
            each[:, slots, :, :length] = each[:, source : source + 1, :, :length]

    def write(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Put tokens in.

        Args:
            layer: its number.
            rows: int64 ``[batch, 1]``, slots.
            positions: int64 ``[batch, tokens]``.
            key, value: ``[batch, tokens, kv heads, head size]``.
        """
        places = (rows, slice(None), positions)
        for kept, scales, new in (
            (self.keys, self.key_scales, key),
            (self.values, self.value_scales, value),
        ):
            if self.scheme is None:
                kept[layer][places] = new
            else:
                codes, scale = _packed(new, self.scheme)
                view = (
                    torch.uint8 if self.scheme == "fp8_e4m3" else codes.dtype
                )  # indices of fp8 are not there
                kept[layer].view(view)[places] = codes.view(view)
                scales[layer][places] = scale

    def read(self, layer: int, slots: Tensor | slice, reach: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots, up to a position: ``[batch, kv heads, reach, head size]`` each."""
        seen = (slots, slice(None), slice(reach))
        if self.scheme is None:
            return self.keys[layer][seen], self.values[layer][seen]
        key, value = (
            _unpacked(kept[layer][seen], scales[layer][seen], self.scheme).to(self.dtype)
            for kept, scales in ((self.keys, self.key_scales), (self.values, self.value_scales))
        )
        return key, value

    def _tensors(self) -> tuple[Tensor, ...]:
        held = (self.keys, self.values)
        return held if self.scheme is None else (*held, self.key_scales, self.value_scales)


def cache_bytes(tokens: int, size: int, itemsize: int, scheme: str | None) -> int:
    """Of keys and values of ``tokens`` of a head, over all layers and heads together."""
    if scheme is None:
        return 2 * tokens * size * itemsize
    return 2 * tokens * ((size // 2 if scheme == "int4" else size) + 8)


def _packed(x: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes, and scales and offsets ``[..., 2, 2]``, of ``[..., size]``."""
    x = x.float().view(*x.shape[:-1], 2, -1)
    if scheme == "fp8_e4m3":
        scale = (x.abs().amax(-1) / _LARGEST).clamp_(min=_LEAST).half()
        codes = (x / scale.float()[..., None]).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
        return codes.flatten(-2), torch.stack([scale, torch.zeros_like(scale)], dim=-1)
    levels = _LEVELS[scheme]
    offset = x.amin(-1).half()
    scale = ((x.amax(-1) - offset.float()) / levels).clamp_(min=_LEAST).half()
    steps = (x - offset.float()[..., None]) / scale.float()[..., None]
    codes = (steps + 0.5).floor_().clamp_(0, levels).to(torch.uint8)
    stored = codes[..., 0, :] | (codes[..., 1, :] << 4) if scheme == "int4" else codes.flatten(-2)
    return stored, torch.stack([scale, offset], dim=-1)


def _unpacked(codes: Tensor, scales: Tensor, scheme: str) -> Tensor:
    """float32 ``[..., size]``."""
    int4 = scheme == "int4"
    halves = torch.stack([codes & 15, codes >> 4], dim=-2) if int4 else codes.view(*codes.shape[:-1], 2, -1)
    scales = scales.float()
    return (halves.float() * scales[..., :1] + scales[..., 1:]).flatten(-2)
