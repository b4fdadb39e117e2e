"""Commands that list and write, as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlquant import __version__, catalog
from rlquant.quant import FORMATS

Run = Callable[..., Any]


def test_version(rlquant: Run) -> None:
    assert rlquant("--version").out == f"rlquant {__version__}\n"


def test_ls_names_everything_that_is_shipped(rlquant: Run) -> None:
    agents, envs = rlquant("ls"), rlquant("ls", "envs")
    assert all(name in agents.out for name in catalog.agents())
    assert all(name in envs.out for name in catalog.envs())
    assert all(name in rlquant("ls", "schemes").out for name in FORMATS)
    assert rlquant("ls", "recipes").status == 0


def test_ls_of_something_else(rlquant: Run) -> None:
    done = rlquant("ls", "agent")
    assert done.status == 2
    assert "Did you mean 'agents'" in done.err


def test_formats_show_how_a_number_is_stored(rlquant: Run) -> None:
    assert "0.3125" in rlquant("formats", "fp8_e4m3", "--value", "0.3").out
    assert "448" in rlquant("formats", "fp8_e4m3").out
    done = rlquant("formats", "fp8")
    assert done.status == 2
    assert "fp8_e4m3" in done.err


def test_env_tells_versions(rlquant: Run) -> None:
    out = rlquant("env").out
    assert "torch:" in out
    assert f"rlquant: {__version__}" in out


def test_evaluate_writes_results_and_a_report(rlquant: Run, tmp_path: Path) -> None:
    done = rlquant(
        "evaluate", "ppo-cartpole", "--precisions", "int8,w8a8", "--episodes", 5, "--out", tmp_path / "run"
    )
    assert done.status == 0
    assert "int8" in done.out
    document = json.loads((tmp_path / "run/results.json").read_text())
    assert document["schema"] == "rlquant.results/1"
    assert document["subject"]["sha256"] == catalog.agent_card("ppo-cartpole")["sha256"]
    assert document["settings"]["episodes"] == 5
    report = (tmp_path / "run/report.html").read_text()
    assert report.startswith("<!doctype html>") or report.startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("scheme", ["w8a8", "int4-g32"])
def test_quantize_writes_an_artifact(rlquant: Run, tmp_path: Path, scheme: str) -> None:
    done = rlquant("quantize", "ppo-cartpole", "--scheme", scheme, "--out", tmp_path / "artifact")
    assert done.status == 0
    assert scheme in done.out
    assert {path.name for path in (tmp_path / "artifact").iterdir()} == {"policy.json", "policy.safetensors"}
