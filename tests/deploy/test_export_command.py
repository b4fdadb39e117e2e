"""``rlquant export``, as a user meets it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlquant.control import load, quantize_agent, save_artifact
from rlquant.control.collect import collect
from rlquant.control.compile import compile_agent
from rlquant.deploy.files import load_program
from rlquant.deploy.runtime import ReferenceRuntime

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    agent = load("sac-pendulum")
    folder = tmp_path_factory.mktemp("artifact")
    save_artifact(quantize_agent(agent, "w8a8", inputs=collect(agent, 1, seed=1)), folder)
    return folder


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
def test_c_compiles_and_checks_itself(rlquant: Run, artifact: Path, tmp_path: Path) -> None:
    assert rlquant("export", artifact, "--to", "c", "--out", tmp_path).status == 0
    command = ["cc", "-std=c99", "-O1", "policy.c", "main.c", "-lm", "-o", "check"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./check"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:3]) == (0, "ok:")


def test_a_program_folder_acts_as_the_artifact(rlquant: Run, artifact: Path, tmp_path: Path) -> None:
    assert rlquant("export", artifact, "--to", "program", "--out", tmp_path).status == 0
    observations = np.random.default_rng(0).normal(0, 1, (50, 3)).astype(np.float32)
    stored, compiled = (
        ReferenceRuntime(program).act_batch(observations)
        for program in (load_program(tmp_path), compile_agent(load(artifact)))
    )
    np.testing.assert_array_equal(stored, compiled)


def test_onnx_carries_what_it_was_made_from(rlquant: Run, artifact: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    assert rlquant("export", artifact, "--to", "onnx", "--out", tmp_path).status == 0
    model = onnx.load(tmp_path / "policy.onnx")
    metadata = {each.key: each.value for each in model.metadata_props}
    assert metadata["environment"] == "Pendulum-v1"
    assert metadata["precision"] == "w8a8"


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("sac-pendulum", "cpp", "unknown export target 'cpp'"),
        ("nowhere", "c", "nowhere"),
    ],
)
def test_what_cannot_be_exported(
    rlquant: Run, tmp_path: Path, source: str, target: str, message: str
) -> None:
    done = rlquant("export", source, "--to", target, "--out", tmp_path / "out")
    assert done.status == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()
