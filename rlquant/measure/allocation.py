"""What one action allocates: time in an allocator is time that nobody can bound, and what is kept piles up."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlquant.measure.memory import rss_bytes

__all__ = ["Allocation", "measure_allocation"]


@dataclass(frozen=True)
class Allocation:
    """Memory of an action.

    Attributes:
        bytes_per_call: the most that Python and NumPy held at once during a call, the action included. What
            C libraries allocate of their own shows in ``rss_growth`` alone.
        action_bytes: the same, where nothing but the action is allocated.
        blocks_kept: Python's memory blocks after all calls, less those before.
        rss_growth: physical memory of the process after all calls, less that before; None where the system
            does not tell.
        calls: how many.
    """

    bytes_per_call: int
    action_bytes: int
    blocks_kept: int
    rss_growth: int | None
    calls: int

    @property
    def only_action(self) -> bool:
        """Whether a call allocates nothing but the action that it returns."""
        return self.bytes_per_call <= self.action_bytes


def measure_allocation(
    act: Callable[[Any], Any], observations: Sequence[Any], *, calls: int = 1000
) -> Allocation:
    """Call ``act`` again and again and look at the memory.

    Args:
        act: takes one observation, returns an action.
        observations: cycled over.
        calls: how many.
    """
    inputs = list(observations)
    for observation in inputs:  # caches fill
        action = act(observation)
    like = np.asarray(action)
    peak = max(_peak(lambda x=x: act(x)) for x in inputs[:16])  # type: ignore[misc]
    bare = _peak(lambda: np.empty(like.shape, like.dtype) if like.shape else np.empty((), like.dtype)[()])
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        resident, blocks = rss_bytes(), sys.getallocatedblocks()
        for i in range(calls):
            act(inputs[i % len(inputs)])
        kept, now = sys.getallocatedblocks() - blocks, rss_bytes()
    finally:
        if enabled:
            gc.enable()
    growth = None if resident is None or now is None else now - resident
    return Allocation(peak, bare, kept, growth, calls)


def _peak(call: Callable[[], Any]) -> int:
    """Bytes that are held at once during a call, on top of those before."""
    tracemalloc.start()
    try:
        call()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
