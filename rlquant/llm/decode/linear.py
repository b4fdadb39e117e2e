"""Linear layers of one input as one kernel call (``linear_cuda.py``): where their weights are, and their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.adapter_layer import AdapterLinear
from rlquant.llm.decode.linear_cuda import FIELDS, linear_kernel
from rlquant.llm.fused_nf4 import is_nf4

__all__ = ["FusedLinear", "Scratch", "row_height"]

_LINEAR = {"COLUMNS": 32, "BLOCKS": 4, "num_warps": 4}
"""Of programs of linear layers: outputs, and blocks of 64 inputs."""


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


class FusedLinear:
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
        return row_height(rows), -(-self.size // (64 * _LINEAR["BLOCKS"]))

    def reserve(self, scratch: Scratch, rows: int) -> None:
        """Ask for what so many rows need."""
        height, split = self.plan(rows)
        programs = len(self.tiles) * -(-rows // height)
        scratch.need(programs * split * height * (_LINEAR["COLUMNS"] * (1 + self.gated) + 1), programs)

    def __call__(
        self, x: Tensor, out: Tensor, scratch: Scratch, norm: Any = None, residual: Tensor | None = None
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


def _words(x: Tensor) -> Tensor:
    """Two values in each word."""
    return x.detach().view(torch.int32 if x.dtype.itemsize == 2 else torch.int64)
