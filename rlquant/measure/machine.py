"""The state of the machine while something is timed: what else it did, on which core, and how fast that runs.

A latency says little without it: another process on the core, a hypervisor that takes the core away or a
governor that saves power move every percentile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MachineState", "pinned", "watched"]

_BUSY = 0.2  # cores
_STOLEN = 0.05


@dataclass
class MachineState:
    """What was seen while something was timed. None is what the system does not tell.

    Attributes:
        cores: that this process may use.
        core: that the timed thread was pinned to; None where it was free to move.
        load: average number of processes that wanted to run, over a minute: before and after.
        governor: how the clock speed of the core is chosen.
        mhz: its clock speed, at the end.
        others: cores' worth of time that other processes took meanwhile.
        stolen: cores' worth of time that the hypervisor gave to other virtual machines.
    """

    cores: int | None = None
    core: int | None = None
    load: tuple[float, float] | None = None
    governor: str | None = None
    mhz: float | None = None
    others: float | None = None
    stolen: float | None = None

    def remarks(self) -> list[str]:
        """Sentences on what makes the timings doubtful; none on a quiet machine."""
        found = []
        if self.others is not None and self.others > _BUSY:
            found.append(
                f"the machine was busy: other processes took {self.others:.1f} of {os.cpu_count()} cores"
            )
        elif self.others is None and self.load is not None and self.load[0] > (self.cores or 1) / 2:
            found.append(f"the machine was busy: a load of {self.load[0]:.1f} on {self.cores} cores")
        if self.stolen is not None and self.stolen > _STOLEN:
            found.append(f"the hypervisor took {self.stolen:.2f} cores away")
        if self.governor not in (None, "performance"):
            found.append(f"the clock speed follows the governor {self.governor}, not performance")
        return found


@contextmanager
def watched() -> Iterator[MachineState]:
    """Fills a :class:`MachineState` in when the block ends; :func:`pinned` belongs inside it."""
    state = MachineState(cores=_cores())
    load, started = _load(), (time.monotonic(), *_processor_seconds(), _own_seconds())
    yield state
    after = (time.monotonic(), *_processor_seconds(), _own_seconds())
    elapsed, busy, stolen, own = (now - then for now, then in zip(after, started, strict=True))
    if busy == busy and elapsed > 0:  # no NaN: the system tells
        state.others, state.stolen = max(0.0, busy - own) / elapsed, stolen / elapsed
    last = _load()
    state.load = (load, last) if load is not None and last is not None else None
    folder = Path(f"/sys/devices/system/cpu/cpu{state.core or 0}/cpufreq")
    state.governor = _text(folder / "scaling_governor")
    kilohertz = _text(folder / "scaling_cur_freq")
    state.mhz = float(kilohertz) / 1e3 if kilohertz else None


@contextmanager
def pinned(pin: bool = True) -> Iterator[int | None]:
    """Keep this thread on one core inside the block, and let it go after it.

    Args:
        pin: False changes nothing.

    Yields:
        The core: the last one that the process may use, as the first ones serve most interrupts. None where
        the system cannot pin (macOS, Windows).
    """
    if not pin or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _load() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return None


def _processor_seconds() -> tuple[float, float]:
    """Seconds that all processes have run on all cores, and seconds stolen; NaN where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, fields[:8])
    except (OSError, ValueError):
        return float("nan"), float("nan")
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + interrupts + soft_interrupts) / ticks, stolen / ticks


def _own_seconds() -> float:
    """Of this process and of those that it started and waited for."""
    return sum(os.times()[:4])


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
