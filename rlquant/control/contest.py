"""Runtimes and precisions side by side: how long does one action take, and is it in time?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlquant import catalog
from rlquant.control.collect import raw_observations
from rlquant.control.program_session import actor_in
from rlquant.control.quantizer import Quantizer
from rlquant.deploy.runtime import RUNTIMES
from rlquant.errors import InputError, unknown_name
from rlquant.measure import Latency, measure_side_by_side, single_thread
from rlquant.quant import MixedScheme

__all__ = ["BENCH_RUNTIMES", "Contender", "Timing", "contest", "enter"]

BENCH_RUNTIMES = ("torch", *RUNTIMES)


@dataclass(frozen=True)
class Contender:
    """One precision in one runtime: ``act`` maps an observation to an action."""

    precision: str
    runtime: str
    act: Callable[[Any], Any]
    simulated: bool

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.precision} {self.runtime}"


@dataclass(frozen=True)
class Timing:
    """What a contender took.

    Attributes:
        precision, runtime: of the contender.
        latency: of warm calls.
        cold_us: the first call.
        misses: share of calls that took longer than a control period; None where the environment names no rate.
        speedup: median of the first contender over this one's.
    """

    precision: str
    runtime: str
    latency: Latency
    cold_us: float
    misses: float | None
    speedup: float


def enter(
    quantizer: Quantizer, precisions: Sequence[str], runtimes: Sequence[str], *, method: str = "rtn"
) -> tuple[list[Contender], list[str]]:
    """All pairs that can run, and sentences on those that cannot.

    Raises:
        InputError: an unknown precision, method or runtime, or nothing that can run.
    """
    unknown = next((name for name in runtimes if name not in BENCH_RUNTIMES), None)
    if unknown is not None:
        raise unknown_name("runtime", unknown, BENCH_RUNTIMES)
    entered: list[Contender] = []
    left_out: list[str] = []
    for precision in precisions:
        scheme = MixedScheme.parse(precision)
        agent = quantizer.quantize(scheme, method)
        for runtime in runtimes:
            try:
                act = actor_in(agent, runtime)
            except InputError as error:
                left_out.append(f"{scheme.name} in {runtime} is left out: {error}")
                continue
            simulated = runtime == "torch" and not scheme.is_identity
            entered.append(Contender(scheme.name, runtime, act, simulated))
    if not entered:
        raise InputError("; ".join(left_out))
    return entered, left_out


def contest(
    quantizer: Quantizer, contenders: Sequence[Contender], *, calls: int = 5000, seed: int = 0
) -> list[Timing]:
    """Time contenders in turns, on one thread, on observations of one on-policy episode.

    Args:
        quantizer: of the fp32 agent.
        contenders: see :func:`enter`.
        calls: of each.
        seed: of the episode.
    """
    agent = quantizer.agent
    card = catalog.env_card(agent.env.id) or {}
    rate = card.get("control_rate_hz")
    observations = raw_observations(agent, seed=seed, pool=quantizer.pool)
    with single_thread():
        timed = measure_side_by_side({each.name: each.act for each in contenders}, observations, calls=calls)
    first = float(np.median(timed[contenders[0].name][1:]))
    timings = []
    for each in contenders:
        cold, warm = timed[each.name][0], timed[each.name][1:]
        misses = float((warm > 1e9 / rate).mean()) if rate else None
        latency = Latency.of(warm, simulated=each.simulated)
        speedup = first / float(np.median(warm))
        timings.append(Timing(each.precision, each.runtime, latency, float(cold) / 1e3, misses, speedup))
    return timings
