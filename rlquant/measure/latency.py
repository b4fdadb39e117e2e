"""Latency of one action, as a caller sees it: observation in, action out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.errors import InputError

__all__ = ["Latency", "measure_latency", "measure_side_by_side", "single_thread"]


@dataclass(frozen=True)
class Latency:
    """Time per action in microseconds.

    Attributes:
        p50: median. p90, p99, p999: percentiles, each a latency that was really seen. max: the slowest call.
        calls: how many calls were timed.
        simulated: True unless the timed code really computes with the packed low-bit weights.
    """

    p50: float
    p90: float
    p99: float
    p999: float
    max: float
    calls: int
    simulated: bool

    @classmethod
    def of(cls, nanoseconds: NDArray[np.int64], *, simulated: bool) -> Latency:
        """Of timed calls, ``[calls]``."""
        quantiles = np.quantile(nanoseconds / 1e3, [0.5, 0.9, 0.99, 0.999], method="inverted_cdf")
        p50, p90, p99, p999 = quantiles.tolist()
        return cls(p50, p90, p99, p999, float(nanoseconds.max() / 1e3), len(nanoseconds), simulated)


def measure_latency(
    act: Callable[[Any], object],
    observations: Sequence[Any] | NDArray[Any],
    *,
    calls: int = 2000,
    warmup: int = 200,
    simulated: bool,
) -> Latency:
    """Time ``act(observation)`` call by call, cycling over ``observations``.

    The garbage collector is off while the clock runs. The thread count is the caller's: wrap the call in
    :func:`single_thread` for the batch-1 figure. ``act`` must return a finished action on the host; one that
    returns a CUDA tensor would be timed without its work.

    Args:
        act: takes one observation, returns an action.
        observations: array [n, ...] or sequence of n observations, n >= 1.
        calls: timed calls, after ``warmup`` untimed ones.
        warmup: untimed calls (caches, lazy initialisation, clock speed).
        simulated: recorded as given, see :class:`Latency`.

    Raises:
        InputError: no observation, ``calls`` below 1 or ``warmup`` below 0.
    """
    if len(observations) == 0:
        raise InputError("latency needs at least one observation")
    if calls < 1 or warmup < 0:
        raise InputError(f"latency needs calls >= 1 and warmup >= 0, not calls={calls} and warmup={warmup}")
    inputs = [observations[i] for i in range(min(len(observations), calls + warmup))]
    with _no_garbage_collection():
        for i in range(warmup):
            act(inputs[i % len(inputs)])
        nanoseconds = _time_calls(act, inputs, calls)
    return Latency.of(nanoseconds, simulated=simulated)


def measure_side_by_side(
    acts: Mapping[str, Callable[[Any], object]],
    observations: Sequence[Any],
    *,
    calls: int,
    rounds: int = 10,
    warmup: int = 100,
) -> dict[str, NDArray[np.int64]]:
    """Time several policies in turns, so that a machine that slows down slows them all.

    Args:
        acts: by name; each takes one observation and returns an action.
        observations: cycled over.
        calls: of each policy in all.
        rounds: turns.
        warmup: untimed calls at the start of each turn: another policy has had the caches.

    Returns:
        Nanoseconds of each call, int64 ``[calls]`` by name; the first one is the very first call of the policy, cold.
    """
    timed: dict[str, list[NDArray[np.int64]]] = {name: [] for name in acts}
    inputs = list(observations)
    with _no_garbage_collection():
        for name, act in acts.items():
            timed[name].append(_time_calls(act, inputs, 1))
        for turn in range(rounds):
            for name, act in acts.items():
                for i in range(warmup):
                    act(inputs[i % len(inputs)])
                share = (calls - 1) // rounds + (turn < (calls - 1) % rounds)
                timed[name].append(_time_calls(act, inputs, share))
    return {name: np.concatenate(parts) for name, parts in timed.items()}


def _time_calls(act: Callable[[Any], object], inputs: list[Any], calls: int) -> NDArray[np.int64]:
    nanoseconds = np.empty(calls, dtype=np.int64)
    clock, n = time.perf_counter_ns, len(inputs)
    for i in range(calls):
        observation = inputs[i % n]
        start = clock()
        act(observation)
        nanoseconds[i] = clock() - start
    return nanoseconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread inside the block, and restore the thread count after it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
