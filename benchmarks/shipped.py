"""What every shipped agent keeps at each precision under round-to-nearest: the table of the README.

    python benchmarks/shipped.py [--episodes 100] [--out benchmarks/shipped.md]

Runs go to ``runs/shipped-<agent>``; an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlquant import catalog

PRECISIONS = ("bf16", "int8", "w8a8", "int4", "w4a8")
MARKS = {"retained": "", "lost": " **lost**", "undecided": " ?"}


def evaluate(name: str, episodes: int) -> dict[str, Any]:
    """The results document of one agent."""
    out = Path("runs") / f"shipped-{name}"
    command = ["evaluate", name, "--precisions", ",".join(PRECISIONS), "--episodes", str(episodes)]
    subprocess.run(
        [sys.executable, "-m", "rlquant", *command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL
    )
    document: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return document


def table_row(name: str, document: dict[str, Any]) -> str:
    """One line: fp32 return, then the share kept at each precision, and the size at w8a8."""
    rows = {row["precision"]: row for row in document["rows"]}
    score = rows["fp32"]["score"]
    cells = [f"`{name}`", f"{score['mean']:,.1f} ± {score['std']:,.1f}"]
    for precision in PRECISIONS:
        retention = rows[precision]["retention"]
        cells.append(f"{100 * retention['value']:.1f}%{MARKS[retention['verdict']]}")
    kib = [rows[precision]["bytes"]["weights"] / 1024 for precision in ("fp32", "w8a8")]
    cells.append(f"{kib[0]:.1f} → {kib[1]:.1f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run all agents and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    head = ["agent", "fp32 return", *PRECISIONS, "KiB, fp32 → w8a8"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in catalog.agents():
        lines.append(table_row(name, evaluate(name, arguments.episodes)))
        print(lines[-1], flush=True)
    today = datetime.date.today().isoformat()
    lines += ["", f"`python benchmarks/shipped.py --episodes {arguments.episodes}`, {today}."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
