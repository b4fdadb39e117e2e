"""What the command ``bench`` does, once its options are parsed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlquant.commands import default_folder
from rlquant.errors import InputError
from rlquant.runs import RunFolder, machine_info, package_versions

if TYPE_CHECKING:
    from rlquant.control.contest import Contest

__all__ = ["BenchOptions", "run_bench"]


@dataclass(frozen=True)
class BenchOptions:
    """Options of ``rlquant bench``; see its help."""

    source: str
    env: str | None
    precisions: tuple[str, ...]
    runtimes: tuple[str, ...]
    method: str
    calls: int
    seed: int
    normaliser: Path | None
    trust: bool
    pin: bool
    out: Path | None


def run_bench(options: BenchOptions) -> None:
    """Time every precision in every runtime, write bench.json, print the table."""
    from rlquant.control import EnvPool, Quantizer, load
    from rlquant.control.contest import contest, enter
    from rlquant.control.evaluate import subject
    from rlquant.measure import plain

    if options.calls < 100:
        raise InputError(f"--calls must be at least 100, not {options.calls}: a 99th percentile needs them")
    agent = load(options.source, env=options.env, normaliser=options.normaliser, trust=options.trust)
    if agent.precision != "fp32":
        raise InputError(f"{options.source} is quantized to {agent.precision} already; bench the fp32 agent")
    quantizer = Quantizer(agent, EnvPool(agent.env), seed=options.seed)
    contenders, left_out = enter(
        quantizer, options.precisions, options.runtimes, method=options.method, trust=options.trust
    )
    for sentence in left_out:
        sys.stderr.write(f"rlquant: {sentence}\n")
    timed = contest(quantizer, contenders, calls=options.calls, seed=options.seed, pin=options.pin)
    quantizer.pool.close()
    document = {
        "schema": "rlquant.bench/1",
        "subject": subject(agent),
        "machine": machine_info(),
        "versions": package_versions(),
        "state": {**plain(timed.machine), "remarks": timed.machine.remarks()},
        "settings": {"calls": options.calls, "seed": options.seed, "method": options.method},
        "control_rate_hz": timed.control_rate_hz,
        "timings": plain(timed.timings),
        "left_out": left_out,
    }
    folder = RunFolder(options.out or default_folder(agent, "bench"), {"bench": subject(agent)})
    path = folder.write("bench.json", json.dumps(document, indent=1))
    _show(timed, path)


def _show(timed: Contest, path: Path) -> None:
    from rich.console import Console

    from rlquant.report import bench_lines, bench_table

    console = Console(highlight=False)
    console.print(bench_table(timed, console.width))
    for line in bench_lines(timed):
        console.print(line, soft_wrap=True)
    console.print(f"\n{path}", style="dim", soft_wrap=True)
