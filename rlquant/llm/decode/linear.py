"""Linear layers of one input as one kernel call (``linear_cuda.py``): where their weights are, and their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.adapter_layer import AdapterLinear
from rlquant.llm.decode.linear_cuda import FIELDS, linear_kernel, normed_kernel
from rlquant.llm.decode.overlap_cuda import has_ptx, overlap
from rlquant.llm.fused_nf4 import is_nf4
from rlquant.quant import QuantizedWeight, QuantLinear, Scheme

__all__ = ["FusedLinear", "Hidden", "Scratch", "refuse_scattered", "row_height"]

_DENSE, _NF4, _INT8 = 0, 1, 2
_INT8_SCHEME = Scheme.parse("int8")
_COLUMNS, _GATED_COLUMNS = 32, 64
"""Outputs of a program. What is kept for a norm counts on the former."""
_WARPS = 4


def row_height(rows: int) -> int:
    """Rows of a program."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


class Scratch:
    """Memory that all kernels of a step share, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.floats, self.counts = device, 1, 1
        self.parts = self.arrived = torch.empty(0)

    def need(self, floats: int, counts: int) -> None:
        """Let it hold so much at least."""
        self.floats, self.counts = max(self.floats, floats), max(self.counts, counts)

    def make(self) -> None:
        """Allocate."""
        self.parts = torch.zeros(self.floats, device=self.device)
        self.arrived = torch.zeros(self.counts, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Hidden:
    """Hidden states, and what a norm of them needs but the factor of each row, which comes after the next product.

    Attributes:
        states: ``[slots, size]``.
        normed: ``[slots, size]``, times the weights of the norm that follows; float32 for states in float16.
        squares: float32 ``[slots * tiles]``, sums over a row's tiles.
        tiles: of a row.
    """

    states: Tensor
    normed: Tensor
    squares: Tensor
    tiles: int

    @classmethod
    def empty(cls, slots: int, size: int, dtype: torch.dtype, device: torch.device) -> Hidden:
        """Zeros."""
        tiles = -(-size // _COLUMNS)
        wide = torch.float32 if dtype == torch.float16 else dtype
        states, normed = (torch.zeros(slots, size, dtype=each, device=device) for each in (dtype, wide))
        return cls(states, normed, torch.zeros(slots * tiles, device=device), tiles)

    def begin(self, tokens: Tensor, embeddings: Tensor, norm: Any) -> None:
        """Be the embeddings of tokens, ``norm`` next."""
        size = self.states.shape[1]
        normed_kernel[(len(tokens),)](
            tokens, embeddings, norm.weight, self.states, self.normed, self.squares, size, self.tiles,
            SIZE=triton.next_power_of_2(size), TILES=triton.next_power_of_2(self.tiles), num_warps=4,
            **overlap(tokens.device),
        )  # fmt: skip


class FusedLinear:
    """Layers of one input as one kernel call; see ``linear_cuda.py``.

    Args:
        layers: beside each other, or, ``gated``, a gate and its partner.
        dtype: of the states.
        adds: to the hidden states, else it takes their norm.
    """

    def __init__(
        self, layers: Sequence[nn.Module], dtype: torch.dtype, *, gated: bool = False, adds: bool = False
    ) -> None:
        self.gated, self.adds = gated, adds
        self.parts = [_Part(layer, dtype) for layer in layers]
        kinds = {(part.kind, part.nested, part.size) for part in self.parts}
        if len(kinds) > 1:
            raise InputError("layers of one input are packed differently")
        self.kind, self.nested, self.size = kinds.pop()
        self.rank = max(part.rank for part in self.parts)
        if self.rank:
            self.rank = max(16, triton.next_power_of_2(self.rank))
        for part in self.parts:
            part.make_room(self.rank)
        self.columns = _GATED_COLUMNS if gated else _COLUMNS
        self.width = self.parts[0].width if gated else sum(part.width for part in self.parts)
        self.table = torch.tensor(self._tiles(), device=self.parts[0].device)
        self.tiles = len(self.table) // (1 + gated)

    def plan(self, rows: int) -> tuple[int, int, int]:
        """Rows, and blocks of 64 inputs, of a program, and the parts into which these blocks split the inputs.

        As much as the registers of a program hold, and the shared memory of GPUs with 100 KB.
        """
        height = row_height(rows)
        held = 256 if self.kind != _NF4 and height == 16 else 128
        blocks = held // self.columns
        return height, blocks, -(-self.size // (64 * blocks))

    def reserve(self, scratch: Scratch, rows: int) -> None:
        """Ask for what so many rows need."""
        height, _, split = self.plan(rows)
        programs = self.tiles * -(-rows // height)
        scratch.need(programs * split * (1 + self.gated) * height * self.columns, programs)

    def __call__(self, hidden: Hidden, norm: Any, other: Tensor, scratch: Scratch) -> None:
        """``other = layers(norm(hidden))``, or ``hidden += layers(other)``, before ``norm``.

        Args:
            hidden: of all slots.
            norm: of the hidden states.
            other: ``[rows, width]``, or ``[rows, size]``.
            scratch: for sums of parts.
        """
        rows = len(other)
        height, blocks, split = self.plan(rows)
        x, out = (other, hidden.states) if self.adds else (hidden.normed, other)
        linear_kernel[(self.tiles, -(-rows // height), split * (1 + self.gated))](
            x, hidden.squares, self.table, out, norm.weight, hidden.normed, scratch.parts, scratch.arrived,
            rows, self.size // 64, self.width, hidden.tiles, norm.variance_epsilon,
            ROWS=height, COLUMNS=self.columns, BLOCKS=blocks, SPLIT=split, RANK=self.rank,
            KIND=self.kind, NESTED=self.nested, SHUFFLE=has_ptx(x.device), GATED=self.gated, ADDS=self.adds,
            NORM=triton.next_power_of_2(hidden.tiles), num_warps=_WARPS, **overlap(x.device),
        )  # fmt: skip

    def _tiles(self) -> list[list[int]]:
        made, start = [], 0
        for part in self.parts[:1] if self.gated else self.parts:
            for first in range(0, part.width, self.columns):
                for each in self.parts if self.gated else [part]:
                    made.append([*each.addresses(), each.width, start, first])
            start += part.width
        assert len(made[0]) == FIELDS
        return made

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
            dense = None if layer.dense is None else layer.dense.held
            acting = layer.acting
            if dense is None and acting:
                if len(acting) > 1 or acting[0] in layer.lora_variant:
                    raise InputError("a fused step takes one adapter, which is not DoRA's")
                self.adapter = acting[0]
                self.rank = layer.lora_A[self.adapter].weight.shape[0]
            layer = layer.get_base_layer()
        self.base = layer
        self.weight: Any = _weight(layer) if dense is None else dense
        self.kind, self.nested = _DENSE, False
        if dense is None and is_nf4(layer):
            self.kind, self.nested = _NF4, layer.weight.quant_state.state2 is not None
            self.width, self.size = layer.weight.quant_state.shape
        elif isinstance(self.weight, QuantizedWeight):
            self.kind = _INT8
            self.width, self.size = self.weight.shape
        elif (dense is not None or type(layer) is nn.Linear) and self.weight.dtype == dtype:
            self.width, self.size = self.weight.shape
        else:
            raise InputError(
                f"there is no fused step for layers of {type(layer).__name__} in {self.weight.dtype}"
            )
        self.values = self.weight.codes if isinstance(self.weight, QuantizedWeight) else self.weight
        if self.size % 64:
            raise InputError(f"a fused step needs inputs of a multiple of 64, not {self.size}")
        refuse_scattered(self.values)
        self.device = self.values.device
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

    def addresses(self) -> list[int]:
        """See ``linear_cuda.FIELDS``."""
        scales = [0] * 5
        if self.kind == _NF4:
            state = self.weight.quant_state
            inner, offset = (state.state2, state.offset) if self.nested else (state, state.code)
            kept = (state.absmax, inner.absmax, inner.code, offset, state.code)
            scales = [each.data_ptr() for each in kept]
        elif self.kind == _INT8:
            scales[0] = self.weight.scale.data_ptr()
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return [self.values.data_ptr(), *scales, bias, self.a.data_ptr(), self.b.data_ptr()]


def refuse_scattered(weight: Tensor) -> None:
    """Raises InputError where kernels cannot read it by its address."""
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        raise InputError("a fused step reads weights that lie row after row from a multiple of 16 bytes on")


def _weight(layer: Any) -> Any:
    """What a layer multiplies by: a tensor, or codes that the kernel knows."""
    if not isinstance(layer, QuantLinear):
        return layer.weight
    packed, plain = layer.packed, layer.input_scale is None and layer.outlier_index is None
    if plain and packed.scheme == _INT8_SCHEME:
        return packed
    raise InputError(
        f"there is no fused step for layers in {layer.scheme.name}: floats, int8 and bitsandbytes' nf4 have one"
    )
