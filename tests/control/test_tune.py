"""The search for the cheapest scheme that keeps the reward."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlquant.control import Agent, EnvPool, Quantizer, Settings, load, load_artifact, quantize_agent, rollout
from rlquant.control.audition import Audition
from rlquant.control.ladder import ladder
from rlquant.control.sensitivity import BITS, roles, sensitivities
from rlquant.control.tune import tune
from rlquant.errors import InputError
from rlquant.measure import Goal, Sensitivity, validate_results
from rlquant.quant import MixedScheme, weight_bytes
from rlquant.units import parse_bytes, parse_seconds

Run = Callable[..., Any]


def balancing(noise: float = 0.0) -> Agent:
    """A CartPole agent that is linear in truth: the first layer passes the state on, the head weighs it."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Linear(4, 2)]
    with torch.no_grad():
        layers[0].weight.copy_(torch.eye(4) + noise * torch.randn(4, 4))
        layers[0].bias.zero_()
        layers[1].weight.copy_(torch.tensor([[-0.4, -1.0, -6.0, -1.5], [0.4, 1.0, 6.0, 1.5]]))
        layers[1].bias.zero_()
    return Agent.from_module(nn.Sequential(*layers), env="CartPole-v1")


def test_sensitivity_is_of_one_tensor_alone() -> None:
    agent = balancing()
    found = sensitivities(Quantizer(agent, EnvPool(agent.env)), bits=(8, 2))
    assert [(each.layer, each.tensor, each.bits) for each in found] == [
        (layer, tensor, bits)
        for layer in ("trunk.0", "trunk.1")
        for tensor in ("weights", "input")
        for bits in (8, 2)
    ]
    assert [each.role for each in found[::4]] == ["observation", "head"]
    by_name = {(each.layer, each.tensor, each.bits): each.divergence for each in found}
    # The identity is exact on any symmetric grid; a quantized observation is not.
    assert by_name["trunk.0", "weights", 2] < 1e-9 < by_name["trunk.0", "input", 2]
    assert all(by_name[layer, tensor, 8] <= by_name[layer, tensor, 2] for layer, tensor, _ in by_name)


def test_an_observation_can_have_fewer_than_8_bits_where_it_is_named() -> None:
    agent = load("ppo-cartpole")
    found = sensitivities(Quantizer(agent, EnvPool(agent.env)), bits=(8, 2))
    observation = {
        each.bits: each.divergence for each in found if (each.layer, each.tensor) == ("trunk.0", "input")
    }
    assert observation[2] > 10 * observation[8]


@given(costs=st.lists(st.floats(0, 10), min_size=9, max_size=9))
@settings(max_examples=30, deadline=None)
def test_a_ladder_takes_the_cheapest_step(costs: list[float]) -> None:
    agent = load("ppo-cartpole")
    sizes = {"trunk.0": 4 * 64 + 64, "trunk.2": 64 * 64 + 64, "trunk.4": 64 * 2 + 2}
    assert list(sizes) == list(roles(agent.actor))
    added = iter(costs)
    total = {
        layer: dict(zip(BITS, itertools.accumulate([0.0, *itertools.islice(added, 3)]), strict=True))
        for layer in sizes
    }
    rungs = ladder(
        agent,
        [
            Sensitivity(layer, "hidden", "weights", bits, cost, None)
            for layer, costs in total.items()
            for bits, cost in costs.items()
        ],
    )
    assert (rungs[0].name, rungs[-1].name, len(rungs)) == ("w8a8", "w2a8", 10)
    for upper, lower in itertools.pairwise(rungs):
        price = {}
        for layer, size in sizes.items():
            bits = _bits(upper, layer)
            if bits > 2:
                below = BITS[BITS.index(bits) + 1]
                price[layer] = (total[layer][below] - total[layer][bits]) / (size * (bits - below))
        (stepped,) = [layer for layer in sizes if _bits(lower, layer) < _bits(upper, layer)]
        assert price[stepped] <= min(price.values()) + 1e-12


def _bits(rung: MixedScheme, layer: str) -> int:
    return dict(rung.layers).get(layer, rung.base).weights.bits


def test_auditions_stop_early_where_it_is_clear() -> None:
    agent = load("dqn-cartpole")
    pool = EnvPool(agent.env)
    audition = Audition(agent, pool, random_score=22.0, seed=0)
    same = audition.hear(quantize_agent(agent, "int8"), retain=0.98, stages=(8, 16))
    assert (same.episodes, same.passed) == (8, True)
    broken = quantize_agent(agent, "int4")
    heard = audition.hear(broken, retain=0.98, stages=(8, 16))
    assert (heard.episodes, heard.passed) == (8, False)
    played = rollout(broken, range(8), seed=audition.seed, pool=pool).returns
    assert heard.retention == pytest.approx((played.mean() - 22) / (500 - 22))


def test_the_cheapest_scheme_is_found_and_proved() -> None:
    proof = Settings(precisions=(), episodes=20, max_episodes=40)
    tuned = tune(balancing(0.02), Goal(0.98), proof, methods=("rtn",))
    assert tuned.held
    row = tuned.results["rows"][-1]
    assert (row["precision"], row["method"]) == (tuned.agent.precision, "rtn")
    assert row["retention"]["verdict"] == "retained"
    cheaper = [trial for trial in tuned.trials if trial.bytes < row["bytes"]["weights"]]
    assert not any(trial.passed for trial in cheaper)
    again = tune(balancing(0.02), Goal(0.98), proof, methods=("rtn",))
    assert again.to_json() == tuned.to_json()
    sizes = [trial.bytes for trial in tuned.front]
    kept = [trial.retention for trial in tuned.front]
    assert sizes == sorted(sizes)
    assert kept == sorted(kept)


def test_an_impossible_goal_gives_the_best_found_and_says_by_how_much(rlquant: Run, tmp_path: Path) -> None:
    options = ("--memory", "500B", "--methods", "rtn", "--episodes", 5, "--max-episodes", 5)
    done = rlquant("tune", "ppo-cartpole", *options, "--out", tmp_path)
    assert done.status == 1
    found = json.loads((tmp_path / "tune.json").read_text())
    assert found["chosen"]["held"] is False
    size = found["trials"][0]["bytes"]
    assert "misses the reward by" in done.out
    assert f"the memory by {size - 500:,} bytes" in done.out
    artifact = load_artifact(tmp_path / "artifact")
    assert artifact.precision == found["chosen"]["precision"]
    assert weight_bytes(artifact.actor) == size
    validate_results(json.loads((tmp_path / "results.json").read_text()))


def test_a_deadline_nothing_can_meet(rlquant: Run, tmp_path: Path) -> None:
    options = ("--deadline", "1ns", "--methods", "rtn", "--episodes", 5, "--max-episodes", 5)
    done = rlquant("tune", "ppo-cartpole", *options, "--out", tmp_path)
    assert done.status == 1
    assert "the deadline by" in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--retain", "1.5"), "above 0 and at most 1, not 1.5"),
        (("--memory", "lots"), "--memory 'lots' is not a positive quantity such as 32KB"),
        (("--deadline", "-1ms"), "--deadline '-1ms'"),
        (("--methods", "gtpq"), "Did you mean 'gptq'"),
        (("--env", "CartPole-v9"), "CartPole"),
    ],
)
def test_bad_goals(rlquant: Run, tmp_path: Path, options: tuple[str, str], message: str) -> None:
    done = rlquant("tune", "ppo-cartpole", *options, "--out", tmp_path)
    assert done.status == 2
    assert message in done.err


def test_quantities() -> None:
    assert parse_bytes("32KB", "--memory") == 32_000
    assert parse_bytes("1.5 KiB", "--memory") == 1536
    assert parse_bytes("8gib", "--memory") == 8 * 2**30
    assert parse_bytes("100", "--memory") == 100
    assert parse_seconds("250us", "--deadline") == pytest.approx(250e-6)
    for text in ("", "0", "1ms3", "3 parsecs", "nan"):
        with pytest.raises(InputError, match="positive quantity"):
            parse_seconds(text, "--deadline")


@pytest.mark.slow
def test_a_search_killed_half_way_gives_the_same_answer(tmp_path: Path) -> None:
    def start(folder: Path) -> subprocess.Popen[bytes]:
        options = ["--methods", "rtn", "--episodes", "20", "--max-episodes", "20", "--out", str(folder)]
        return subprocess.Popen([sys.executable, "-m", "rlquant", "tune", "sac-pendulum", *options])

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    status = start(undisturbed).wait()
    process = start(killed)
    deadline = time.monotonic() + 300
    while len(list((killed / "pieces").glob("audition-w*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() != 0
    assert start(killed).wait() == status
    documents = [json.loads((folder / "tune.json").read_text()) for folder in (undisturbed, killed)]
    assert documents[0] == documents[1]
    weights = [load_artifact(folder / "artifact").actor.state_dict() for folder in (undisturbed, killed)]
    for name, tensor in weights[0].items():
        np.testing.assert_array_equal(tensor.numpy(), weights[1][name].numpy())
