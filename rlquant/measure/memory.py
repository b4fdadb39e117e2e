"""Memory of this process and of the machine, in bytes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["available_bytes", "peak_rss_bytes", "rss_bytes"]


def peak_rss_bytes() -> int | None:
    """The most physical memory this process has held so far, or None where the system does not tell.

    Linux's VmHWM is preferred to getrusage, whose peak a process inherits from the one that started it.
    """
    kilobytes = _proc_kilobytes("/proc/self/status", "VmHWM")
    if kilobytes is not None:
        return kilobytes * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def rss_bytes() -> int | None:
    """The physical memory that this process holds now, or None where the system does not tell."""
    kilobytes = _proc_kilobytes("/proc/self/status", "VmRSS")
    return None if kilobytes is None else kilobytes * 1024


def available_bytes() -> int | None:
    """Physical memory that can be used without swapping, or None where the system does not tell."""
    kilobytes = _proc_kilobytes("/proc/meminfo", "MemAvailable")
    if kilobytes is not None:
        return kilobytes * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _proc_kilobytes(path: str, key: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
