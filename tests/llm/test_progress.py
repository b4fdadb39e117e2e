"""What a run shows of itself."""

from __future__ import annotations

import io
import sys

import pytest

from rlquant.llm.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Progress(8, 2)
    for _ in range(6):
        progress.advance()
    progress.show({"loss": 0.125, "entropy": 3.0}, tokens=1200)
    progress.close()
    shown = stderr.getvalue()
    assert "25%" in shown.split("\r")[1]
    assert "8/8" in shown
    assert "loss 0.125, " in shown
    assert "tokens/s" in shown
    assert "entropy" not in shown


def test_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Progress(4, began=0.0)
    progress.advance()
    progress.show({"reward": 0.5})
    first = stderr.getvalue()
    assert first.startswith("step 1 of 4: reward 0.5, ")
    assert first.endswith(" left\n")
    for _ in range(3):
        progress.advance()
    progress.show({"reward": 0.75}, tokens=10.0)
    assert "00:00 left" in stderr.getvalue().splitlines()[1]
