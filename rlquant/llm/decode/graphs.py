"""Functions on fixed tensors as CUDA graphs, which replay their kernels without asking Python for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Graph"]


class Graph:
    """A function held in a CUDA graph.

    Args:
        function: of tensors that stay where they are; it runs twice here.
        kept: tensors that it writes to, which are afterwards what they were before.
        pool: of ``torch.cuda.graph_pool_handle()``: graphs that never run at the same time share their memory.

    Raises:
        RuntimeError: of torch, where something in it waits for the GPU.
    """

    def __init__(
        self, function: Callable[[], Tensor], *, kept: Sequence[Tensor] = (), pool: Any = None
    ) -> None:
        before = [each.clone() for each in kept]
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(main)
        try:
            with torch.cuda.stream(aside):
                function()  # kernels are compiled, and libraries take their memory
        finally:  # what goes on without a graph finds all as it was
            main.wait_stream(aside)
            for each, value in zip(kept, before, strict=True):
                each.copy_(value)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._found = function()

    def __call__(self) -> Tensor:
        """What the function gives, in memory that the next call writes to."""
        self._graph.replay()
        return self._found
