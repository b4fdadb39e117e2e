"""How many values share one scale: the whole tensor, an output channel, or a group within a channel.

Weights are seen as a matrix ``[rows, columns]``: dimension 0 is the output channel, the rest is flattened
(Linear ``[out, in]``, Conv2d ``[out, in * kh * kw]``). Scales form a matrix ``[scale_rows, groups]``:

=========== ======================= ===============================================
granularity scale shape             a 6 x 70 weight
=========== ======================= ===============================================
tensor      ``[1, 1]``              ``[1, 1]``
channel     ``[rows, 1]``           ``[6, 1]``
group of n  ``[rows, ceil(cols/n)]`` n = 32: ``[6, 3]``, the last group has 6 columns
=========== ======================= ===============================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlquant.errors import InputError

__all__ = ["Granularity", "as_matrix", "row_chunks"]

CHUNK_ELEMENTS = 2**22  # temporaries of one step stay near 16 MiB each, whatever the tensor's size
CACHED_ELEMENTS = 2**18  # and within a core's cache, for searches that go over the same values many times


@dataclass(frozen=True)
class Granularity:
    """Which values share a scale; ``group_size`` counts columns of the weight matrix."""

    kind: Literal["tensor", "channel", "group"]
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "group") != (self.group_size is not None):
            raise InputError(
                f"granularity {self.kind!r} with group size {self.group_size}: only groups have one"
            )
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group size {self.group_size} is not usable: it must be at least 1")

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape of the scales of a ``[rows, columns]`` weight."""
        if self.kind == "tensor":
            return 1, 1
        return rows, 1 if self.group_size is None else -(-columns // self.group_size)

    def blocks(self, matrix: Tensor) -> list[Tensor]:
        """Views of ``matrix``, one row per scale, in column order.

        Groups give ``[rows * full_groups, n]`` and, where the columns do not divide, a second tensor
        ``[rows, remainder]``: the short group is observed as it is, not padded.
        """
        columns = matrix.shape[1]
        if self.kind == "tensor":
            return [matrix.reshape(1, -1)]
        if self.group_size is None or self.group_size >= columns:
            return [matrix]
        full = columns - columns % self.group_size
        head = matrix[:, :full].reshape(-1, self.group_size)
        return [head] if full == columns else [head, matrix[:, full:]]

    def expand(self, per_scale: Tensor, columns: int) -> Tensor:
        """``[scale_rows, groups]`` -> a tensor that broadcasts against ``[scale_rows, columns]``."""
        if self.group_size is None or per_scale.shape[1] == 1:
            return per_scale
        return per_scale.repeat_interleave(self.group_size, dim=1)[:, :columns]


def as_matrix(weight: Tensor) -> Tensor:
    """``[out, ...]`` -> ``[out, columns]``; a vector is one row."""
    return weight.reshape(1, -1) if weight.dim() < 2 else weight.reshape(weight.shape[0], -1)


def row_chunks(rows: int, columns: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of rows of about ``elements`` elements each, so that temporaries fit in memory (or in a cache)."""
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
