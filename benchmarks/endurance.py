"""Ten million actions in a row: does memory grow, do the bits drift, does it slow down?

    python benchmarks/endurance.py [--calls 10000000] [--out benchmarks/endurance.md]

A shipped agent, quantized to w8a8, acts in the native runtime on the observations of one of its episodes, over and
over. Physical memory and Python's memory blocks are read after the first hundredth and after each further tenth, and
the bits of all actions of a pass are compared with those of the first pass. A recurrent agent is reset before each
comparison, and remembers in between.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rlquant.control import collect, load, quantize_agent
from rlquant.control.collect import raw_observations
from rlquant.control.program_session import runtime_of
from rlquant.measure import peak_rss_bytes, rss_bytes
from rlquant.runs import machine_info

AGENTS = ("sac-halfcheetah", "recurrentppo-cartpole")
PARTS = 10


def bits(runtime: Any, observations: list[np.ndarray]) -> bytes:
    """All actions of one pass from a new episode on."""
    runtime.reset()
    return b"".join(np.asarray(runtime.act(x)).tobytes() for x in observations)


def run(runtime: Any, observations: list[np.ndarray], calls: int) -> float:
    """Seconds of ``calls`` actions."""
    act, started = runtime.act, time.perf_counter()
    passes, rest = divmod(calls, len(observations))
    for _ in range(passes):
        for x in observations:
            act(x)
    for x in observations[:rest]:
        act(x)
    return time.perf_counter() - started


def endure(name: str, calls: int) -> dict[str, Any]:
    """What one agent went through."""
    agent = load(name)
    quantized = quantize_agent(agent, "w8a8", inputs=collect(agent, 2, seed=1))
    observations = raw_observations(agent, seed=0)
    runtime = runtime_of(quantized, "native")
    expected = bits(runtime, observations)
    run(runtime, observations, calls // 100)  # the interpreter's own caches fill
    gc.collect()
    resident, blocks, seconds, drifted = [rss_bytes() or 0], [sys.getallocatedblocks()], [], 0
    for _ in range(PARTS):
        seconds.append(run(runtime, observations, calls // PARTS))
        resident.append(rss_bytes() or 0)
        blocks.append(sys.getallocatedblocks())
        drifted += bits(runtime, observations) != expected
    return {
        "agent": f"{name} w8a8",
        "calls": calls,
        "rss_growth": max(resident) - resident[0],
        "block_growth": max(blocks) - blocks[0],
        "drifted": drifted,
        "first_us": 1e6 * seconds[0] / (calls // PARTS),
        "last_us": 1e6 * seconds[-1] / (calls // PARTS),
        "minutes": sum(seconds) / 60,
    }


def main() -> None:
    """Run all agents and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=10_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    lines = [
        "| agent | actions | growth of physical memory | of Python's blocks | passes whose bits differed "
        "| first tenth, us an action | last tenth | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in AGENTS:
        seen = endure(name, options.calls)
        lines.append(
            f"| {seen['agent']} | {seen['calls']:,} | {seen['rss_growth']:,} B | {seen['block_growth']} | "
            f"{seen['drifted']} of {PARTS} | {seen['first_us']:.2f} | {seen['last_us']:.2f} | {seen['minutes']:.1f} |"
        )
        print(lines[-1], flush=True)
    peak = (peak_rss_bytes() or 0) / 2**20
    command = f"python benchmarks/endurance.py --calls {options.calls}"
    processor = machine_info()["processor"]
    lines += [
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, {processor}, the loop around each call included; "
        f"the process peaked at {peak:,.0f} MiB, most of it torch.",
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
