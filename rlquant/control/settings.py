"""What determines the scores of an evaluation."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlquant.control.collect import CALIBRATION_SEED
from rlquant.control.methods import parse_method
from rlquant.control.runtimes import AUTO_RUNTIME, RUNTIME_CHOICES
from rlquant.errors import InputError, unknown_name
from rlquant.quant import MixedScheme

__all__ = ["LOOKS", "RealTimeSettings", "Settings", "settings_json"]

LOOKS = 5
"""How often a sequential run may look; each look's interval has confidence ``1 - (1 - c) / LOOKS`` (Bonferroni)."""


@dataclass(frozen=True)
class RealTimeSettings:
    """Evaluate in a world that does not wait, too; see :mod:`rlquant.control.realtime`.

    Attributes:
        slowdowns: factors on the latencies; each is played.
        latencies_us: microseconds by row (``w8a8-rtn``; ``""`` for every row), replayed; None measures them.
        control_rate_hz: steps of the environment in a second; None for what its card says.
    """

    slowdowns: tuple[float, ...] = (1.0,)
    latencies_us: Mapping[str, tuple[float, ...]] | None = None
    control_rate_hz: float | None = None

    def __post_init__(self) -> None:
        for option, values in (("--slowdown", self.slowdowns), ("--control-rate", (self.control_rate_hz,))):
            for value in values:
                if value is not None and not (math.isfinite(value) and value > 0):
                    raise InputError(f"{option} must be positive, not {value:g}")
        if not self.slowdowns:
            raise InputError("--slowdown names nothing; for example --slowdown 1,50,200")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; given latencies by the hash of their values."""
        given = "measured"
        if self.latencies_us is not None:
            content = json.dumps(self.latencies_us, sort_keys=True)
            given = f"given, sha256 {hashlib.sha256(content.encode()).hexdigest()[:12]}"
        return {
            "slowdowns": list(self.slowdowns),
            "latency": given,
            "control_rate_hz": self.control_rate_hz,
        }


@dataclass(frozen=True)
class Settings:
    """What determines the scores of an evaluation.

    Attributes:
        precisions: scheme names; fp32 is always evaluated, as the reference.
        methods: see :func:`~rlquant.control.methods.parse_method`; each precision is tried with each.
        episodes: number ``i`` starts with ``env.reset(seed=seed + i)``.
        seed: of the first episode.
        margin: share of the reward that may be lost.
        confidence: of the two-sided intervals.
        calibration_episodes: on other seeds than any that scores.
        closed_loop: rounds in which the quantized agent plays and is calibrated again.
        sequential: run more episodes where a verdict is undecided.
        max_episodes: where a sequential run stops.
        device: where the network runs, in torch.
        runtime: what plays and is timed: ``torch``, one of ``rlquant.deploy.RUNTIMES``, or ``auto`` for the fastest
            right one of each precision.
        realtime: play ``episodes`` in real time, too; None does not.
    """

    precisions: tuple[str, ...] = ("fp32", "int8", "w8a8")
    methods: tuple[str, ...] = ("rtn",)
    episodes: int = 100
    seed: int = 0
    margin: float = 0.02
    confidence: float = 0.95
    calibration_episodes: int = 8
    closed_loop: int = 0
    sequential: bool = False
    max_episodes: int = 2000
    device: str = "cpu"
    runtime: str = AUTO_RUNTIME
    realtime: RealTimeSettings | None = None

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIME_CHOICES:
            raise unknown_name("runtime", self.runtime, RUNTIME_CHOICES)
        if self.episodes < 1 or self.calibration_episodes < 1:
            raise InputError(
                f"at least one episode is needed, not {min(self.episodes, self.calibration_episodes)}; "
                "20 give a first impression, 100 an interval worth quoting"
            )
        if self.closed_loop < 0:
            raise InputError(f"--closed-loop counts rounds: 0 (none) or more, not {self.closed_loop}")
        if self.max_episodes < 1:
            raise InputError(f"--max-episodes must be at least 1, not {self.max_episodes}")
        if not 0 <= self.seed < CALIBRATION_SEED - self.max_episodes:
            raise InputError(
                f"the seed must be between 0 and {CALIBRATION_SEED - self.max_episodes - 1}, not {self.seed}"
            )
        if not 0 <= self.margin < 1:
            raise InputError(
                f"the margin must be at least 0 and below 1, not {self.margin}; 0.02 allows a loss of 2%"
            )
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"the confidence must be at least 0.5 and below 1, not {self.confidence}")
        for method in self.methods:
            parse_method(method)

    @property
    def interval_confidence(self) -> float:
        """Of one retention interval: a sequential run divides its error among its looks."""
        return 1 - (1 - self.confidence) / (LOOKS if self.sequential else 1)

    def left_out(self) -> list[str]:
        """Which method cannot do which scheme, where another does it."""
        return [
            f"{method} cannot do {scheme.name}"
            for scheme in map(MixedScheme.parse, self.precisions)
            for method in self.methods
            if not scheme.is_identity and not parse_method(method).can(scheme)
        ]

    def schemes(self) -> list[tuple[MixedScheme, str]]:
        """(scheme, method) of each row: fp32 first, then in the order given, none twice.

        Raises:
            InputError: a scheme is unknown, or none of the methods can do it.
        """
        rows = [(MixedScheme.parse("fp32"), "none")]
        for name in self.precisions:
            scheme = MixedScheme.parse(name)
            able = [method for method in self.methods if parse_method(method).can(scheme)]
            if scheme.is_identity:
                able = ["none"]
            elif not able:
                parse_method(self.methods[0]).check(scheme)
            rows += [(scheme, method) for method in able]
        return list(dict.fromkeys(rows))


def settings_json(settings: Settings) -> dict[str, Any]:
    """The ``settings`` of a results document."""
    return {
        **asdict(settings),
        "precisions": list(settings.precisions),
        "methods": list(settings.methods),
        "realtime": settings.realtime and settings.realtime.to_json(),
        "interval_confidence": settings.interval_confidence,
    }
