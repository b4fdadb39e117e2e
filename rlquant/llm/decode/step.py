"""A whole decode step of a Llama-style decoder in five kernels a layer, from the weights that train.

See ``linear_cuda.py``, ``attend_cuda.py`` and ``sample_cuda.py``. Nothing here allocates or waits while a step runs, so
that a CUDA graph can hold many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.adapter_layer import AdapterLinear
from rlquant.llm.decode.attend_cuda import attend_kernel
from rlquant.llm.decode.cache import CACHES, StaticCache
from rlquant.llm.decode.linear_cuda import FIELDS, linear_kernel
from rlquant.llm.decode.sample_cuda import FOUND, choose_kernel, head_kernel
from rlquant.llm.decoding import Decoder, State
from rlquant.llm.fused_blocks import SILU
from rlquant.llm.fused_nf4 import is_nf4
from rlquant.llm.sampling import Sampling

__all__ = ["FusedStep"]

_ROWS = 64
_LINEAR = {"COLUMNS": 32, "BLOCKS": 4, "num_warps": 4}
"""Of programs of linear layers: outputs, and blocks of 64 inputs."""
_HEAD = {"COLUMNS": 128, "INNER": 64, "num_warps": 4, "num_stages": 3}
"""Of programs of the head: tokens of the vocabulary, inputs at a time."""
_ATTEND = {"TOKENS": 128, "num_warps": 4, "num_stages": 2}
_SPAN = 128
"""Tokens of a cache for which attention takes a further program."""


class _Scratch:
    """Memory that all kernels of a step share, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.floats, self.counts = device, 1, 1
        self.parts = self.arrived = torch.empty(0)

    def need(self, floats: int, counts: int) -> None:
        self.floats, self.counts = max(self.floats, floats), max(self.counts, counts)

    def make(self) -> None:
        self.parts = torch.zeros(self.floats, device=self.device)
        self.arrived = torch.zeros(self.counts, dtype=torch.int32, device=self.device)


class _Fused:
    """Layers of one input as one kernel call; see ``linear_cuda.py``."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype, *, gated: bool = False) -> None:
        self.gated, self.dtype = gated, dtype
        self.parts = [_Part(layer, dtype) for layer in layers]
        kinds = {(part.nf4, part.size) for part in self.parts}
        if len(kinds) > 1:
            raise InputError("layers of one input are packed differently")
        self.nf4, self.size = kinds.pop()
        self.rank = max(part.rank for part in self.parts)
        if self.rank:
            self.rank = max(16, triton.next_power_of_2(self.rank))
        device = self.parts[0].device
        for part in self.parts:
            part.make_room(self.rank)
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + (0 if gated else part.width))
        self.width = self.parts[0].width if gated else starts[-1]
        self.table = torch.tensor(
            [part.fields(start) for part, start in zip(self.parts, starts, strict=False)], device=device
        )
        assert self.table.shape[1] == FIELDS
        self.tiles = self._tiles()

    def plan(self, rows: int) -> tuple[int, int]:
        """Rows of a program, and parts of the inputs."""
        height = 16 if rows <= 16 else 32 if rows <= 32 else _ROWS
        return height, -(-self.size // (64 * _LINEAR["BLOCKS"]))

    def reserve(self, scratch: _Scratch, rows: int) -> None:
        """Ask for what so many rows need."""
        height, split = self.plan(rows)
        programs = len(self.tiles) * -(-rows // height)
        scratch.need(programs * split * height * (_LINEAR["COLUMNS"] * (1 + self.gated) + 1), programs)

    def __call__(
        self, x: Tensor, out: Tensor, scratch: _Scratch, norm: Any = None, residual: Tensor | None = None
    ) -> None:
        """``out = [residual +] layers([norm] x)``; ``[rows, size]`` to ``[rows, width]``."""
        rows = len(x)
        height, split = self.plan(rows)
        linear_kernel[(len(self.tiles), -(-rows // height), split)](
            _words(x), _words(norm.weight if norm is not None else x), self.table, self.tiles,
            residual if residual is not None else x, out, scratch.parts, scratch.arrived, rows, self.size // 2,
            self.width, norm.variance_epsilon if norm is not None else 0.0,
            ROWS=height, SPLIT=split, RANK=self.rank, NF4=self.nf4, NORM=norm is not None, GATED=self.gated,
            RESIDUAL=residual is not None, **_LINEAR,
        )  # fmt: skip

    def _tiles(self) -> Tensor:
        which = range(1) if self.gated else range(len(self.parts))
        columns = _LINEAR["COLUMNS"]
        made = [(each, start) for each in which for start in range(0, self.parts[each].width, columns)]
        return torch.tensor(made, dtype=torch.int32, device=self.table.device)

    def refresh(self) -> None:
        """Take the adapters as they are now."""
        for part in self.parts:
            part.refresh()


class _Part:
    """One layer: where its weight is, and its adapter in the dtype of the states."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer, self.dtype, self.rank, self.adapter = layer, dtype, 0, None
        dense = None
        if isinstance(layer, AdapterLinear):
            dense, acting = layer.dense, layer.acting
            if dense is None and acting:
                if len(acting) > 1 or acting[0] in layer.lora_variant:
                    raise InputError("a fused step takes one adapter, which is not DoRA's")
                self.adapter = acting[0]
                self.rank = layer.lora_A[self.adapter].weight.shape[0]
            layer = layer.get_base_layer()
        self.base = layer
        self.weight: Any = dense if dense is not None else layer.weight
        self.nf4 = dense is None and is_nf4(layer)
        if self.nf4:
            self.width, self.size = layer.weight.quant_state.shape
        elif (dense is not None or type(layer) is nn.Linear) and self.weight.dtype == dtype:
            self.width, self.size = self.weight.shape
        else:
            raise InputError(
                f"there is no fused step for layers of {type(layer).__name__} in {self.weight.dtype}"
            )
        if self.size % 64 or self.weight.data_ptr() % 16:
            raise InputError(
                f"a fused step needs aligned weights and inputs of a multiple of 64, not {self.size}"
            )
        self.device = self.weight.device
        bias = layer.bias
        self.bias = None if bias is None else bias.detach().to(dtype)

    def make_room(self, rank: int) -> None:
        """For the adapter's products, filled up with zeros to ``rank``."""
        self.a = torch.zeros(rank, self.size, dtype=self.dtype, device=self.device)
        self.b = torch.zeros(self.width, rank, dtype=self.dtype, device=self.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the adapter as it is now."""
        if self.adapter is not None:
            self.a[: self.rank].copy_(self.layer.lora_A[self.adapter].weight)
            scaled = self.layer.lora_B[self.adapter].weight * self.layer.scaling[self.adapter]
            self.b[:, : self.rank].copy_(scaled)

    def fields(self, start: int) -> list[int]:
        """See ``linear_cuda.FIELDS``."""
        scales = [self.weight.data_ptr()] * 5
        nested = False
        if self.nf4:
            state = self.weight.quant_state
            nested = state.state2 is not None
            inner = state.state2 if nested else state
            offset = state.offset if nested else state.code
            kept = (state.absmax, inner.absmax, inner.code, offset, state.code)
            scales = [each.data_ptr() for each in kept]
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return [
            self.weight.data_ptr(),
            *scales,
            bias,
            self.a.data_ptr(),
            self.b.data_ptr(),
            self.width,
            start,
            nested,
        ]


class FusedStep:
    """Steps of a model over a cache.

    Args:
        decoder: whose model it is, with its adapter as it acts now.
        cache: is written to.
        state: is written to.
        sampling: without filters.

    Raises:
        InputError: a layer, a size or an adapter that the kernels do not know.
    """

    def __init__(self, decoder: Decoder, cache: StaticCache, state: State, sampling: Sampling) -> None:
        self.decoder, self.cache, self.state, self.sampling = decoder, cache, state, sampling
        layers = decoder.layers
        head: Any = decoder.model.get_output_embeddings()
        size = int(layers[0].self_attn.head_dim)
        if size & (size - 1) or not 32 <= size <= 256:
            raise InputError(f"a fused step needs heads of 32, 64, 128 or 256 values, not {size}")
        for block in layers:
            if type(block.mlp.act_fn).__name__ not in SILU:
                raise InputError(f"a fused step multiplies by SiLU, not by {type(block.mlp.act_fn).__name__}")
        if sampling.filters:
            raise InputError("a fused step samples from the whole distribution")
        dtype, config = decoder.dtype, decoder.model.config
        if type(head) is not nn.Linear or head.weight.dtype != dtype or _has_bias(head):
            raise InputError(f"there is no fused step for a head of {type(head).__name__}")
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, size
        self.blocks = [
            (
                _Fused([b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj], dtype),
                _Fused([b.self_attn.o_proj], dtype),
                _Fused([b.mlp.gate_proj, b.mlp.up_proj], dtype, gated=True),
                _Fused([b.mlp.down_proj], dtype),
            )
            for b in layers
        ]
        slots, device = cache.slots, cache.keys.device
        self.scratch = _Scratch(device)
        for block in self.blocks:
            for each in block:
                for rows in _powers(slots):
                    each.reserve(self.scratch, rows)
        self.group = self.heads // self.kv_heads
        self.padded = max(16, triton.next_power_of_2(self.group))
        self.split = min(8, max(1, cache.length // _SPAN))
        self.scratch.need(
            slots * self.kv_heads * self.split * self.padded * (size + 2), slots * self.kv_heads
        )
        self.scratch.make()
        self.tiles = -(-head.weight.shape[0] // _HEAD["COLUMNS"])
        new: Any = {"dtype": dtype, "device": device}
        self.hidden = torch.zeros(slots, config.hidden_size, **new)
        self.queries = torch.zeros(slots, (self.heads + 2 * self.kv_heads) * size, **new)
        self.mixed = torch.zeros(slots, self.heads * size, **new)
        self.gated = torch.zeros(slots, config.intermediate_size, **new)
        self.found = torch.zeros(slots, self.tiles, FOUND, device=device)
        positions = torch.arange(cache.length, device=device)[None]
        self.turn = [each[0].contiguous() for each in decoder.turn(self.hidden[None], positions)]
        if self.turn[0].shape[-1] != size:
            raise InputError("a fused step turns whole heads by their position")

    def refresh(self) -> None:
        """Take the adapters as they are now."""
        for block in self.blocks:
            for each in block:
                each.refresh()

    def __call__(self, slots: int, drawn: Tensor) -> None:
        """The next token of the first slots; ``drawn``: float32 ``[3, cache.slots]``, see ``sample_cuda.py``."""
        hidden, scratch = self.hidden[:slots], self.scratch
        queries, mixed, gated = self.queries[:slots], self.mixed[:slots], self.gated[:slots]
        hidden.copy_(self.decoder.embedded(self.state.tokens[:slots]))
        for number, (block, fused) in enumerate(zip(self.decoder.layers, self.blocks, strict=True)):
            project, out, gate, down = fused
            project(hidden, queries, scratch, block.input_layernorm)
            self._attend(number, block.self_attn, queries, mixed)
            out(mixed, hidden, scratch, residual=hidden)
            gate(hidden, gated, scratch, block.post_attention_layernorm)
            down(gated, hidden, scratch, residual=hidden)
        self._choose(hidden, drawn)

    def _attend(self, number: int, part: Any, queries: Tensor, mixed: Tensor) -> None:
        normed = hasattr(part, "q_norm")
        cache = self.cache
        scales = (queries, queries)
        if cache.scheme is not None:
            scales = (cache.key_scales[number], cache.value_scales[number])
        attend_kernel[(len(queries), self.kv_heads, self.split)](
            queries, self.state.positions, *self.turn, part.q_norm.weight if normed else queries,
            part.k_norm.weight if normed else queries, cache.keys[number], cache.values[number], *scales, mixed,
            self.scratch.parts, self.scratch.arrived, self.heads, self.kv_heads, cache.length, part.scaling,
            part.q_norm.variance_epsilon if normed else 0.0,
            KIND=CACHES[cache.scheme] if cache.scheme else 0, HALF=self.size // 2, GROUP=self.group,
            HEADS=self.padded, NORM=normed, SPLIT=self.split,
            **_ATTEND,
        )  # fmt: skip

    def _choose(self, hidden: Tensor, drawn: Tensor) -> None:
        rows, state = len(hidden), self.state
        norm, head = self.decoder.norm, self.decoder.model.get_output_embeddings()
        height = 16 if rows <= 16 else 32 if rows <= 32 else _ROWS
        temperature = self.sampling.temperature
        head_kernel[(self.tiles, -(-rows // height))](
            hidden, norm.weight, head.weight, state.seeds, state.places, self.found, rows, hidden.shape[1],
            head.weight.shape[0], norm.variance_epsilon, 1.0 / (temperature or 1.0),
            ROWS=height, GREEDY=temperature == 0, **_HEAD,
        )  # fmt: skip
        choose_kernel[(rows,)](
            self.found, state.tokens, state.positions, state.places, drawn, self.tiles, drawn.shape[1],
            self.cache.length, COLUMNS=_HEAD["COLUMNS"], TILES=triton.next_power_of_2(self.tiles), num_warps=4,
        )  # fmt: skip


def _words(x: Tensor) -> Tensor:
    """Two values in each word."""
    return x.detach().view(torch.int32 if x.dtype.itemsize == 2 else torch.int64)


def _has_bias(layer: Any) -> bool:
    return layer.bias is not None


def _powers(slots: int) -> list[int]:
    """Numbers of slots that steps look at."""
    return [*(1 << each for each in range(slots.bit_length()) if 1 << each < slots), slots]
