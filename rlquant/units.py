"""Quantities on the command line: ``32KB``, ``8GiB``, ``1ms``, ``250us``."""

from __future__ import annotations

import re

from rlquant.errors import InputError

__all__ = ["parse_bytes", "parse_seconds"]

_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def parse_bytes(text: str, option: str) -> int:
    """Bytes; KB is 1,000 and KiB 1,024 of them. Raises InputError that names the option."""
    return int(_quantity(text, option, {name: float(size) for name, size in _BYTES.items()}, "32KB or 8GiB"))


def parse_seconds(text: str, option: str) -> float:
    """Seconds. Raises InputError that names the option."""
    return _quantity(text, option, _SECONDS, "1ms or 250us")


def _quantity(text: str, option: str, units: dict[str, float], example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    unit = units.get(match[2]) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise InputError(f"{option} {text!r} is not a positive quantity such as {example}")
    return float(match[1]) * unit
