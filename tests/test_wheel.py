"""The wheel, built and installed into a clean environment, does the main job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("RLQUANT_TEST_WHEEL"), reason="installs torch anew: set RLQUANT_TEST_WHEEL=1"
)
def test_the_wheel_evaluates_a_shipped_agent(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--constraint", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True)
    command = tmp_path / "env" / "bin" / "rlquant"

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "ppo-cartpole" in run("ls")
    assert "PixelCatch-v1" in run("ls", "envs")
    run("evaluate", "ppo-cartpole", "--precisions", "int8", "--episodes", "5", "--out", "run")
    document = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["precision"] for row in document["rows"]] == ["fp32", "int8"]
    assert document["rows"][1]["retention"]["value"] == 1.0
