"""Closed loop in real time: the world goes on while the policy computes (``envs/realtime.py`` says how).

What is replayed are the latencies of the policy itself, measured on this machine in its own runtime or given,
times a slowdown for a slower chip: how much reward does a chip's speed cost at each precision?

The slowdown multiplies each latency up to the 99th percentile. What the rarest calls take beyond it are
interruptions by the machine (another process, an interrupt), not the chip's arithmetic: they are replayed as long
as they were, or a pause of 50 us would become one of 50 ms on a chip 1,000 times slower.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rlquant import catalog
from rlquant.control.agent import Agent
from rlquant.control.environment import EnvSpec
from rlquant.errors import InputError
from rlquant.measure import Latency, Retention, Score, measure_side_by_side, plain, single_thread
from rlquant.units import parse_seconds

__all__ = [
    "Coupling",
    "check_realtime",
    "control_rate",
    "latencies_of",
    "measured_latencies",
    "read_latencies",
    "realtime_json",
]

_CALLS = 2001  # of each policy; the first, cold one is left out


@dataclass(frozen=True)
class Coupling:
    """How the time of an action enters the world.

    Attributes:
        latencies_us: microseconds of successive actions, replayed; see ``RealTime`` in ``envs/realtime.py``.
        slowdown: factor on them; see :meth:`slowed_us`.
        control_rate_hz: steps of the environment in a second.
        simulated: the latencies were measured in code that does not compute with the packed low-bit weights.
    """

    latencies_us: tuple[float, ...]
    slowdown: float
    control_rate_hz: float
    simulated: bool = False

    def slowed_us(self) -> np.ndarray:
        """Microseconds of successive actions, float64 ``[n]``; interruptions are not slowed down."""
        measured = np.asarray(self.latencies_us)
        computing = np.minimum(measured, np.quantile(measured, 0.99, method="inverted_cdf"))
        slowed: np.ndarray = self.slowdown * computing + (measured - computing)
        return slowed

    def wrap(self, env: gym.Env) -> Any:
        """A ``RealTime`` environment around one."""
        return catalog.env_module("realtime.py").RealTime(env, self.slowed_us(), self.control_rate_hz)


def check_realtime(agent: Agent) -> None:
    """Raises InputError for an agent that cannot act late."""
    if agent.masked:
        raise InputError(
            f"{agent.source} chooses among allowed actions, and one that arrives late may be forbidden by then; "
            "evaluate it without --realtime"
        )


def control_rate(env: EnvSpec, given: float | None = None) -> float:
    """Steps of an environment in a second: as given, or as its card says.

    Raises:
        InputError: no card tells the rate of this environment, made with these keyword arguments.
    """
    if given is not None:
        return given
    card = catalog.env_card(env.id) or {}
    if not card.get("control_rate_hz") or card["make"]["kwargs"] != env.kwargs:
        made = f" made with {env.kwargs}" if env.kwargs else ""
        raise InputError(
            f"real time needs to know how many steps of {env.id}{made} are a second, and no card tells; "
            "give it with --control-rate, such as --control-rate 50"
        )
    return float(card["control_rate_hz"])


def read_latencies(text: str) -> dict[str, tuple[float, ...]]:
    """Latencies in microseconds by row, from ``2ms`` or from a JSON file; the key ``""`` stands for every row.

    The file holds a list of microseconds, or one for each row, as ``latencies.json`` of an earlier run does.

    Raises:
        InputError: neither a duration nor such a file.
    """
    path = Path(text)
    if not path.is_file():
        if path.suffix == ".json":
            raise InputError(f"--latency {text!r}: there is no such file")
        return {"": (1e6 * parse_seconds(text, "--latency"),)}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found if isinstance(found, dict) else {"": found}
        read = {str(row): tuple(map(float, values)) for row, values in rows.items()}
    except (OSError, ValueError, TypeError):
        read = {}
    if not read or not all(
        values and min(values) >= 0 and np.isfinite(values).all() for values in read.values()
    ):
        raise InputError(
            f"--latency {text!r} is neither a duration such as 2ms nor a JSON file with a list of microseconds, or "
            "one for each row as in latencies.json of an earlier run"
        )
    return read


def latencies_of(
    rows: Sequence[str], given: Mapping[str, tuple[float, ...]] | None
) -> dict[str, tuple[float, ...]] | None:
    """The given latencies of each row; None where none are given. Raises InputError for a row without any."""
    if given is None:
        return None
    lacking = [row for row in rows if row not in given and "" not in given]
    if lacking:
        raise InputError(
            f"--latency has no latencies of {', '.join(lacking)}; it has those of {', '.join(given)}"
        )
    return {row: given.get(row, given.get("", ())) for row in rows}


def measured_latencies(
    acts: Mapping[str, Callable[[Any], object]], observations: Sequence[Any]
) -> dict[str, list[float]]:
    """Microseconds of successive warm actions of each policy, timed in turns on one thread, by name."""
    with single_thread():
        timed = measure_side_by_side(acts, observations, calls=_CALLS)
    return {name: (nanoseconds[1:] / 1e3).tolist() for name, nanoseconds in timed.items()}


def realtime_json(
    coupling: Coupling, timing: np.ndarray, *, score: Score, retention: Retention
) -> dict[str, Any]:
    """One entry of the ``realtime`` part of a row in results.json.

    Args:
        coupling: what was played.
        timing: ``[episodes, 4]``: observations seen, taken, actions late, sum of delays in periods.
        score: of those episodes.
        retention: against the reference in a world that waits.
    """
    seen, taken, late, delay = timing.sum(axis=0).tolist()
    latency = Latency.of(np.round(1e3 * coupling.slowed_us()).astype(np.int64), simulated=coupling.simulated)
    return {
        "slowdown": coupling.slowdown,
        "latency_us": plain(latency),
        "control_rate_hz": coupling.control_rate_hz,
        "actions_hz": coupling.control_rate_hz * taken / seen,
        "missed": 1 - taken / seen,
        "late": late / taken,
        "delay_periods": delay / taken,
        "score": plain(score),
        "retention": plain(retention),
    }
