"""A quantized linear layer whose columns are stored in another order than its inputs come.

GPTQ with act-order lets the columns of a group lie anywhere. Sorted by group, they are a weight like others; what
that costs is one gather of the input. (ExLlama's kernels do the same.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.quant import QuantLinear

if TYPE_CHECKING:
    from rlquant.llm.checkpoints.affine_linear import AffineLinear

__all__ = ["PermutedLinear", "group_order"]


class PermutedLinear(QuantLinear):
    """``y = W[:, order] x[order] + b``. Buffers: those of QuantLinear, and ``input_order`` int32 ``[in]``."""

    input_order: Tensor

    def __init__(self, layer: nn.Linear, stored: AffineLinear) -> None:
        super().__init__(layer, stored.scheme)
        assert stored.order is not None
        self.register_buffer("input_order", stored.order.to(torch.int32))

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32, columns in the order of the inputs."""
        stored = self.packed.cached()
        return torch.empty_like(stored).index_copy_(1, self.input_order.long(), stored)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's map of ``x``."""
        return super().forward(x.index_select(-1, self.input_order))


def group_order(g_idx: Tensor, group_size: int | None, name: str) -> Tensor | None:
    """The order that sorts columns by group, int64 ``[in]``; None where they are sorted.

    Args:
        g_idx: ``[in]``, the group of each column.
        group_size: columns of a group, the last of which may be shorter; None for one group.
        name: of the tensor, for messages.

    Raises:
        InputError: the groups are not of that size.
    """
    columns = torch.arange(len(g_idx), device=g_idx.device)
    wanted = columns // (group_size or len(g_idx))
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], wanted):
        raise InputError(f"{name} is damaged: it does not deal columns into groups of {group_size}")
    return None if torch.equal(order, columns) else order
