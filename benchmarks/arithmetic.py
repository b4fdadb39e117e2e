"""A verifiable reward: short sums, and whether a completion ends with the right number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["score", "sums"]

_FINAL = re.compile(r"(\d+)\W*$")


def sums(largest: int = 15) -> list[dict[str, str]]:
    """Every sum of two numbers from 1 on, as a prompt and its answer."""
    numbers = range(1, largest + 1)
    return [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in numbers for b in numbers]


def score(prompts: list[str], completions: list[str], rows: Sequence[dict[str, Any]]) -> list[float]:
    """0.2 for a completion that ends with a number, 1 where that is the sum, else 0."""
    found = [_FINAL.search(each.strip()) for each in completions]
    pairs = zip(found, rows, strict=True)
    return [0.0 if last is None else 1.0 if last[1] == row["answer"] else 0.2 for last, row in pairs]
