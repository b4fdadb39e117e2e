"""Every command of the README works, and each Makefile target that it names is there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("rlquant ")]
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_the_commands_work(
    rlquant: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # in order: later commands may use what earlier ones wrote
    assert COMMANDS
    for command in COMMANDS:
        done = rlquant(*shlex.split(command, comments=True)[1:])
        assert done.status == 0, (command, done.err)


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_the_python_examples_work(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_make_targets_are_there() -> None:
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )
    named = {
        target for block in BLOCKS for target in re.findall(r"^make ([a-z-]+)", block, flags=re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets
