"""How much reward policies keep at few bits: every shipped agent, and any folder of rl-zoo agents.

    python benchmarks/retention.py [--zoo FOLDER] [--episodes 100] [--workers 2] [--out benchmarks/retention.md]

Each cell is a ``rlquant evaluate`` run of its own under ``runs/retention``, with paired episodes and with more of
them where a verdict is undecided; an interrupted benchmark goes on where it stopped. ``auto`` is the best
training-free method, chosen on episodes that score nothing. FOLDER holds ``ALGORITHM/ENVIRONMENT_1`` folders, as
github.com/DLR-RM/rl-trained-agents does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlquant import catalog

MARKS = {"retained": "", "lost": " **lost**", "undecided": " ?"}


@dataclass(frozen=True)
class Column:
    """A scheme by a method, judged at a margin."""

    scheme: str
    method: str
    margin: float

    @property
    def title(self) -> str:
        """Head of the column."""
        return f"{self.scheme} {self.method}"


COLUMNS = (
    Column("w8a8", "auto", 0.02),
    Column("w8a8", "distill", 0.02),
    Column("int4", "rtn", 0.05),
    Column("int4", "auto", 0.05),
    Column("int4", "distill", 0.02),
    Column("int3", "rtn", 0.05),
    Column("int3", "auto", 0.05),
    Column("w3a8", "distill", 0.05),
    Column("w2a4", "distill", 0.10),
)


def agents(zoo: Path | None) -> dict[str, str]:
    """Sources by name: what is shipped, then the folders of a zoo."""
    found = {name: name for name in catalog.agents()}
    for config in sorted(zoo.glob("*/*_1/*.zip")) if zoo is not None else ():
        found[f"{config.parent.parent.name}/{config.parent.name.removesuffix('_1')}"] = str(config.parent)
    return found


def evaluate(name: str, source: str, column: Column, options: argparse.Namespace) -> dict[str, Any] | None:
    """The results document of one cell; None where it failed."""
    out = options.runs / re.sub(r"[^\w.-]+", "-", f"{name}-{column.title}")
    if options.collect:
        return (
            json.loads((out / "results.json").read_text("utf-8")) if (out / "results.json").exists() else None
        )
    command = [sys.executable, "-m", "rlquant", "evaluate", source, "--precisions", column.scheme]
    command += ["--method", column.method, "--margin", str(column.margin), "--out", str(out)]
    command += [
        "--episodes",
        str(options.episodes),
        "--sequential",
        "--max-episodes",
        str(options.max_episodes),
    ]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
    print(f"{name} {column.title}: {done.stderr.strip() or 'done'}", flush=True)
    if done.returncode:
        return None
    document: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return document


def cell(document: dict[str, Any] | None) -> str:
    """Share of the reward that is kept, the verdict and the chosen method."""
    if document is None:
        return "-"
    row = document["rows"][1]
    retention, chosen = row["retention"], row["method"].partition("=")[2]
    value = "-" if retention["value"] is None else f"{100 * retention['value']:.1f}%"
    return f"{value}{MARKS[retention['verdict']]}{f' ({chosen})' if chosen else ''}"


def summary(column: Column, documents: list[dict[str, Any] | None]) -> str:
    """How many agents are retained, and who is not."""
    verdicts = [document["rows"][1]["retention"]["verdict"] for document in documents if document]
    return f"{verdicts.count('retained')} of {len(verdicts)} at {column.margin:g}"


def three_bit_losses(table: dict[str, dict[Column, dict[str, Any] | None]]) -> tuple[float, float]:
    """Mean share of the reward that RTN and the chosen method lose at 3 bits; a gain counts as no loss."""
    losses: dict[str, list[float]] = {"rtn": [], "auto": []}
    for cells in table.values():
        found = {column.method: cells[column] for column in COLUMNS if column.scheme == "int3"}
        values = {
            method: document["rows"][1]["retention"]["value"] if document else None
            for method, document in found.items()
        }
        for method, value in values.items() if None not in values.values() else ():
            losses[method].append(min(1.0, max(0.0, 1 - float(value or 0.0))))
    return statistics.mean(losses["rtn"]), statistics.mean(losses["auto"])


def machines(table: dict[str, dict[Column, dict[str, Any] | None]]) -> list[str]:
    """What the cells were measured on and with."""
    documents = [document for cells in table.values() for document in cells.values() if document]
    return sorted(
        {f"{d['machine']['processor']} (torch {d['versions']['torch'].partition('+')[0]})" for d in documents}
    )


def markdown(table: dict[str, dict[Column, dict[str, Any] | None]], command: str) -> str:
    """The committed table."""
    lines = [
        "| agent | fp32 return | " + " | ".join(f"{c.title}, margin {c.margin:g}" for c in COLUMNS) + " |"
    ]
    lines.append("|" + "---|" * (len(COLUMNS) + 2))
    for name, cells in table.items():
        first = next((document for document in cells.values() if document), None)
        score = f"{first['rows'][0]['score']['mean']:,.1f}" if first else "-"
        lines.append(f"| {name} | {score} | " + " | ".join(cell(cells[column]) for column in COLUMNS) + " |")
    totals = [summary(column, [cells[column] for cells in table.values()]) for column in COLUMNS]
    lines.append("| **retained** |  | " + " | ".join(totals) + " |")
    rtn, chosen = three_bit_losses(table)
    lines += [
        "",
        f"At 3 bits (int3) round-to-nearest loses {100 * rtn:.1f}% of the reward on average over these agents, "
        f"the chosen training-free method {100 * chosen:.1f}%. **lost** and ? (undecided) are verdicts at the margin.",
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, on {' and '.join(machines(table))}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cells, the longest first, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--max-episodes", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression for the names of the agents to run")
    parser.add_argument("--collect", action="store_true", help="only gather what has been run")
    parser.add_argument("--runs", type=Path, default=Path("runs/retention"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    chosen = {name: source for name, source in agents(options.zoo).items() if re.search(options.only, name)}
    jobs = [
        (name, column) for column in sorted(COLUMNS, key=lambda c: c.method != "distill") for name in chosen
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        found = pool.map(lambda job: evaluate(job[0], chosen[job[0]], job[1], options), jobs)
        results = dict(zip(jobs, found, strict=True))
    table = {name: {column: results[name, column] for column in COLUMNS} for name in chosen}
    zoo = " --zoo FOLDER" if options.zoo else ""
    command = f"python benchmarks/retention.py{zoo} --episodes {options.episodes}"
    options.out.write_text(markdown(table, command), encoding="utf-8")


if __name__ == "__main__":
    main()
