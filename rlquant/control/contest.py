"""Runtimes and precisions side by side: how long does one action take, and is it in time?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant import catalog
from rlquant.control.collect import raw_observations
from rlquant.control.program_session import actor_in
from rlquant.control.quantizer import Quantizer
from rlquant.control.runtimes import is_simulated
from rlquant.control.sb3_predict import predict_in_sb3
from rlquant.deploy.runtime import RUNTIMES
from rlquant.errors import InputError, unknown_name
from rlquant.measure import (
    Allocation,
    Latency,
    MachineState,
    measure_allocation,
    measure_side_by_side,
    pinned,
    single_thread,
    watched,
)
from rlquant.quant import MixedScheme

__all__ = ["BENCH_RUNTIMES", "Contender", "Contest", "Timing", "contest", "enter"]

BENCH_RUNTIMES = ("sb3", "torch", *RUNTIMES)
_ALLOCATION_CALLS = 1000


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
    """What a contender took, in microseconds.

    Attributes:
        precision, runtime: of the contender.
        latency: of warm calls.
        cold_us: the first call.
        jitter_us: the 99th percentile less the median: what a control loop has to keep in reserve.
        std_us: standard deviation of warm calls; one interrupted call in thousands moves it.
        misses: share of calls that took longer than a control period; None where the environment names no rate.
        speedup: median of the first contender over this one's.
        allocation: what a call allocates.
    """

    precision: str
    runtime: str
    latency: Latency
    cold_us: float
    jitter_us: float
    std_us: float
    misses: float | None
    speedup: float
    allocation: Allocation


@dataclass(frozen=True)
class Contest:
    """The timings, in the order of the contenders, at which control rate, and what the machine did meanwhile."""

    timings: list[Timing]
    control_rate_hz: float | None
    machine: MachineState


def enter(
    quantizer: Quantizer,
    precisions: Sequence[str],
    runtimes: Sequence[str],
    *,
    method: str = "rtn",
    trust: bool = False,
) -> tuple[list[Contender], list[str]]:
    """All pairs that can run, and sentences on those that cannot.

    Args:
        quantizer: of the fp32 agent.
        precisions: schemes.
        runtimes: of :data:`BENCH_RUNTIMES`; ``sb3`` enters once, first and in fp32, whatever the precisions.
        method: quantization method.
        trust: let SB3 load a checkpoint that is not shipped.

    Raises:
        InputError: an unknown precision, method or runtime, or nothing that can run.
    """
    unknown = next((name for name in runtimes if name not in BENCH_RUNTIMES), None)
    if unknown is not None:
        raise unknown_name("runtime", unknown, BENCH_RUNTIMES)
    schemes = [MixedScheme.parse(precision) for precision in precisions]
    entered: list[Contender] = []
    left_out: list[str] = []
    if "sb3" in runtimes:
        try:
            act = predict_in_sb3(quantizer.agent, trust=trust)
            entered.append(Contender("fp32", "sb3", act, False))
        except InputError as error:
            left_out.append(f"sb3 is left out: {error}")
    for scheme in schemes:
        agent = quantizer.quantize(scheme, method)
        for runtime in runtimes:
            if runtime == "sb3":
                continue
            try:
                act = actor_in(agent, runtime)
            except InputError as error:
                left_out.append(f"{scheme.name} in {runtime} is left out: {error}")
                continue
            entered.append(Contender(scheme.name, runtime, act, is_simulated(agent, runtime)))
    if not entered:
        raise InputError("; ".join(left_out))
    return entered, left_out


def contest(
    quantizer: Quantizer,
    contenders: Sequence[Contender],
    *,
    calls: int = 5000,
    seed: int = 0,
    pin: bool = True,
) -> Contest:
    """Time contenders in turns, on one thread, on observations of one on-policy episode.

    Args:
        quantizer: of the fp32 agent.
        contenders: see :func:`enter`.
        calls: of each.
        seed: of the episode.
        pin: keep to one core, where the system can.
    """
    agent = quantizer.agent
    rate = (catalog.env_card(agent.env.id) or {}).get("control_rate_hz")
    observations = raw_observations(agent, seed=seed, pool=quantizer.pool)
    with watched() as machine, pinned(pin) as machine.core, single_thread():
        timed = measure_side_by_side({each.name: each.act for each in contenders}, observations, calls=calls)
        allocated = {
            each.name: measure_allocation(each.act, observations, calls=min(calls, _ALLOCATION_CALLS))
            for each in contenders
        }
    first = float(np.median(timed[contenders[0].name][1:]))
    timings = [_timing(each, timed[each.name], rate, first, allocated[each.name]) for each in contenders]
    return Contest(timings, rate, machine)


def _timing(
    contender: Contender,
    nanoseconds: NDArray[np.int64],
    rate: float | None,
    first: float,
    allocation: Allocation,
) -> Timing:
    warm = nanoseconds[1:]
    latency = Latency.of(warm, simulated=contender.simulated)
    return Timing(
        contender.precision,
        contender.runtime,
        latency,
        cold_us=float(nanoseconds[0]) / 1e3,
        jitter_us=latency.p99 - latency.p50,
        std_us=float(warm.std()) / 1e3,
        misses=float((warm > 1e9 / rate).mean()) if rate else None,
        speedup=first / float(np.median(warm)),
        allocation=allocation,
    )
