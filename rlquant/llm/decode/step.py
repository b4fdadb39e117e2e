"""A whole decode step of a Llama-style decoder in five kernels a layer, from the weights that train.

See ``linear_cuda.py``, ``attend_cuda.py`` and ``sample_cuda.py``. Nothing here allocates or waits while a step runs, so
that a CUDA graph can hold many of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.errors import TritonError

from rlquant.errors import InputError
from rlquant.llm.decode.attend_cuda import attend_kernel
from rlquant.llm.decode.cache import CACHES, StaticCache
from rlquant.llm.decode.linear import FusedLinear, Hidden, Scratch, refuse_scattered, row_height
from rlquant.llm.decode.overlap_cuda import overlap
from rlquant.llm.decode.sample_cuda import FOUND, choose_kernel, head_kernel
from rlquant.llm.decoding import Decoder, State
from rlquant.llm.fused_blocks import SILU
from rlquant.llm.sampling import Sampling

__all__ = ["FusedStep"]

_HEAD = {"COLUMNS": 128, "INNER": 64, "num_warps": 4, "num_stages": 3}
"""Of programs of the head: tokens of the vocabulary, inputs at a time."""
_ATTEND = {"num_warps": 4, "num_stages": 2}
_READ = 16384
"""Bytes of keys that attention reads at a time: two such, and values, lie in shared memory."""
_SPAN = 128
"""Tokens of a cache for which attention takes a further program."""


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
        refuse_scattered(head.weight)
        if type(decoder.embeddings) is not nn.Embedding:
            raise InputError(f"there is no fused step for embeddings of {type(decoder.embeddings).__name__}")
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, size
        self.blocks = [
            (
                FusedLinear([b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj], dtype),
                FusedLinear([b.self_attn.o_proj], dtype, adds=True),
                FusedLinear([b.mlp.gate_proj, b.mlp.up_proj], dtype, gated=True),
                FusedLinear([b.mlp.down_proj], dtype, adds=True),
            )
            for b in layers
        ]
        slots, device = cache.slots, cache.keys.device
        self.overlap = overlap(device)
        self.scratch = Scratch(device)
        for block in self.blocks:
            for each in block:
                for rows in _powers(slots):
                    each.reserve(self.scratch, rows)
        self.group = self.heads // self.kv_heads
        self.padded = max(16, triton.next_power_of_2(self.group))
        self.tokens = max(16, min(128, _READ // (size * dtype.itemsize)))
        self.split = min(8, max(1, cache.length // _SPAN))
        self.scratch.need(
            slots * self.kv_heads * self.split * self.padded * (size + 2), slots * self.kv_heads
        )
        self.scratch.make()
        self.tiles = -(-head.weight.shape[0] // _HEAD["COLUMNS"])
        new: Any = {"dtype": dtype, "device": device}
        self.hidden = Hidden.empty(slots, config.hidden_size, **new)
        self.queries = torch.zeros(slots, (self.heads + 2 * self.kv_heads) * size, **new)
        self.mixed = torch.zeros(slots, self.heads * size, **new)
        self.gated = torch.zeros(slots, config.intermediate_size, **new)
        self.found = torch.zeros(slots, self.tiles, FOUND, device=device)
        positions = torch.arange(cache.length, device=device)[None]
        self.turn = [each[0].contiguous() for each in decoder.turn(self.hidden.states[None], positions)]
        if self.turn[0].shape[-1] != size:
            raise InputError("a fused step turns whole heads by their position")

    def refresh(self) -> None:
        """Take the adapters as they are now."""
        for block in self.blocks:
            for each in block:
                each.refresh()

    def __call__(self, slots: int, drawn: Tensor) -> None:
        """The next token of the first slots; ``drawn``: float32 ``[3, cache.slots]``, see ``sample_cuda.py``.

        Raises:
            InputError: a kernel does not compile for this GPU, or needs more of it than there is.
        """
        try:
            self._step(slots, drawn)
        except TritonError as error:  # it needs what this GPU has not, such as shared memory or fp8
            raise InputError(
                f"a fused step of {slots} sequences in {self.decoder.dtype}: {_last_line(error)}"
            ) from error

    def _step(self, slots: int, drawn: Tensor) -> None:
        hidden, scratch, layers = self.hidden, self.scratch, self.decoder.layers
        queries, mixed, gated = self.queries[:slots], self.mixed[:slots], self.gated[:slots]
        following = [*(block.input_layernorm for block in layers[1:]), self.decoder.norm]
        hidden.begin(self.state.tokens[:slots], self.decoder.embeddings.weight, layers[0].input_layernorm)
        for number, (block, fused) in enumerate(zip(layers, self.blocks, strict=True)):
            project, out, gate, down = fused
            project(hidden, block.input_layernorm, queries, scratch)
            self._attend(number, block.self_attn, queries, mixed)
            out(hidden, block.post_attention_layernorm, mixed, scratch)
            gate(hidden, block.post_attention_layernorm, gated, scratch)
            down(hidden, following[number], gated, scratch)
        self._choose(slots, drawn)

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
            HEADS=self.padded, NORM=normed, SPLIT=self.split, TOKENS=self.tokens,
            **_ATTEND, **self.overlap,
        )  # fmt: skip

    def _choose(self, rows: int, drawn: Tensor) -> None:
        hidden, state = self.hidden, self.state
        norm, head = self.decoder.norm, self.decoder.model.get_output_embeddings()
        height = row_height(rows)
        temperature = self.sampling.temperature
        head_kernel[(self.tiles, -(-rows // height))](
            hidden.normed, hidden.squares, head.weight, state.seeds, state.places, self.found, rows,
            hidden.states.shape[1], head.weight.shape[0], hidden.tiles, norm.variance_epsilon,
            1.0 / (temperature or 1.0), ROWS=height, GREEDY=temperature == 0,
            NORM=triton.next_power_of_2(hidden.tiles), **_HEAD, **self.overlap,
        )  # fmt: skip
        choose_kernel[(rows,)](
            self.found, state.tokens, state.positions, state.places, drawn, self.tiles, drawn.shape[1],
            self.cache.length, COLUMNS=_HEAD["COLUMNS"], TILES=triton.next_power_of_2(self.tiles),
            num_warps=4, **self.overlap,
        )  # fmt: skip


def _has_bias(layer: Any) -> bool:
    return layer.bias is not None


def _powers(slots: int) -> list[int]:
    """Numbers of slots that steps look at."""
    return [*(1 << each for each in range(slots.bit_length()) if 1 << each < slots), slots]


def _last_line(error: Exception) -> str:
    """What a compiler says after where."""
    return str(error).strip().rpartition("\n")[2]
