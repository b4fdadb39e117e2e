"""The main job: rows, verdicts, reproducibility and resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from rlquant.control import Agent, Evaluation, Settings, evaluate, load, rollout
from rlquant.control.collect import CALIBRATION_SEED
from rlquant.errors import InputError
from rlquant.measure import validate_results

TIMES = ("latency_us", "machine")


def without_times(document: Any) -> Any:
    """A results document less what the clock says."""
    if isinstance(document, dict):
        return {key: without_times(value) for key, value in document.items() if key not in TIMES}
    return [without_times(item) for item in document] if isinstance(document, list) else document


@pytest.fixture(scope="module")
def cartpole() -> Agent:
    return load("ppo-cartpole")


def test_fp32_comes_first_and_no_row_twice() -> None:
    names = [f"{s.name}/{m}" for s, m in Settings(precisions=("int8", "fp32", "int8", "w8a8")).schemes()]
    assert names == ["fp32/none", "int8/rtn", "w8a8/rtn"]


def test_rows_hold_the_scores_of_plain_rollouts(cartpole: Agent) -> None:
    found = evaluate(cartpole, ["int8"], episodes=6, seed=5)
    reference, int8 = found["rows"]
    played = rollout(cartpole, range(6), seed=5, runtime=reference["runtime"])
    np.testing.assert_array_equal(reference["score"]["episodes"], played.returns)
    assert reference["agreement"]["action"] == 1.0
    assert reference["latency_us"]["simulated"] is False
    assert int8["latency_us"]["simulated"] is (int8["runtime"] == "torch")
    assert int8["bytes"]["weights"] < 0.33 * reference["bytes"]["weights"]
    assert int8["compression"] == pytest.approx(reference["bytes"]["weights"] / int8["bytes"]["weights"])
    assert len(int8["weights"]) == 3
    assert all(sum(layer["before"]) == sum(layer["after"]) for layer in int8["weights"])


def test_the_same_settings_give_the_same_rows(cartpole: Agent) -> None:
    first, second = (evaluate(cartpole, ["w8a8", "int3"], episodes=5) for _ in range(2))
    assert without_times(first) == without_times(second)


def test_calibration_seeds_are_no_evaluation_seeds() -> None:
    with pytest.raises(InputError, match="seed must be between"):
        Settings(seed=CALIBRATION_SEED)


def test_a_useless_policy_has_no_reward_to_keep() -> None:
    constant = nn.Linear(4, 2)
    nn.init.zeros_(constant.weight)
    agent = Agent.from_module(constant, env="CartPole-v1")
    row = evaluate(agent, ["int8"], episodes=10)["rows"][1]
    assert row["retention"]["verdict"] == "undecided"
    assert row["retention"]["value"] is None
    assert "not clearly better than random" in row["retention"]["reason"]


def test_sequential_runs_more_episodes_only_where_undecided(zoo: Path) -> None:
    agent = load(zoo / "sac/Pendulum-v1_1")
    settings = Settings(precisions=("int8", "w4a8", "int2"), episodes=20, sequential=True, max_episodes=60)
    rows = {row["precision"]: row for row in Evaluation(agent, settings).run()["rows"]}
    assert len(rows["int8"]["score"]["episodes"]) == 20
    assert rows["int8"]["retention"]["verdict"] == "retained"
    assert len(rows["w4a8"]["score"]["episodes"]) == 60
    assert len(rows["fp32"]["score"]["episodes"]) == 60
    assert rows["int2"]["retention"]["verdict"] == "lost"


def test_a_loss_is_found(zoo: Path) -> None:
    rows = evaluate(load(zoo / "dqn/CartPole-v1_1"), ["int8"], episodes=20)["rows"]
    assert rows[1]["retention"]["verdict"] == "lost"
    assert rows[1]["agreement"]["q_gap"]["may_flip"] > 0


@pytest.mark.slow
def test_a_run_killed_half_way_finishes_with_the_same_results(tmp_path: Path) -> None:
    def start(folder: Path) -> subprocess.Popen[bytes]:
        command = ["evaluate", "ppo-cartpole", "--precisions", "int8,w8a8,int4,w4a8", "--episodes", "60"]
        return subprocess.Popen([sys.executable, "-m", "rlquant", *command, "--out", str(folder)])

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed).wait() == 0
    process = start(killed)
    deadline = time.monotonic() + 120
    while not (killed / "pieces" / "int8-rtn.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() != 0
    assert not (killed / "results.json").exists()
    kept = json.loads((killed / "pieces" / "fp32-none.json").read_text())
    assert start(killed).wait() == 0
    documents = [json.loads((folder / "results.json").read_text()) for folder in (undisturbed, killed)]
    assert without_times(documents[0]) == without_times(documents[1])
    validate_results(documents[1])
    assert kept["content"]["returns"] == documents[1]["rows"][0]["score"]["episodes"]
    assert "report.html" in {path.name for path in killed.iterdir()}


@pytest.mark.slow
def test_results_of_other_settings_are_kept(tmp_path: Path) -> None:
    for episodes in ("2", "3"):
        command = ["evaluate", "ppo-cartpole", "--precisions", "int8", "--episodes", episodes]
        subprocess.run([sys.executable, "-m", "rlquant", *command, "--out", str(tmp_path)], check=True)
    now = json.loads((tmp_path / "results.json").read_text())
    (before,) = (json.loads(path.read_text()) for path in (tmp_path / "previous").glob("*/results.json"))
    assert (now["settings"]["episodes"], before["settings"]["episodes"]) == (3, 2)
