"""Preference pairs of GSM8K: a right solution is chosen, a wrong one rejected (Cobbe et al. 2021, arXiv:2110.14168).

The files of https://github.com/openai/grade-school-math, ``grade_school_math/data``, hold four models' solutions to
every test question, and whether each is right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

__all__ = ["pairs", "write_jsonl"]

_MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def pairs(folder: Path, chosen: Literal["written", "model"] = "written") -> list[dict[str, Any]]:
    """A right solution of every question beside each wrong one.

    Args:
        folder: with ``example_model_solutions.jsonl``.
        chosen: the solution that the authors wrote, or one of a model that was right; the latter differs from the
            wrong one in being right, and not in who wrote it, and questions that no model solved are left out.
    """
    lines = (folder / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for row in map(json.loads, lines):
        right = [row[name]["solution"] for name in _MODELS if row[name]["is_correct"]]
        wrong = [row[name]["solution"] for name in _MODELS if not row[name]["is_correct"]]
        right = [row["ground_truth"]] if chosen == "written" else list(dict.fromkeys(right))
        for number, rejected in enumerate(dict.fromkeys(wrong) if right else ()):
            answer = right[number % len(right)]
            found.append({"prompt": row["question"], "chosen": answer, "rejected": rejected})
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
