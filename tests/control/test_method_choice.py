"""Methods by name: trained ones beside those that only round, mixed precision, closed-loop calibration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlquant.control import EnvPool, Quantizer, collect, load, load_artifact, quantize_agent, save_artifact
from rlquant.control import distill as distill_agent
from rlquant.control.closed_loop import quantize_in_closed_loop
from rlquant.control.distill import TRAINED, Distillation
from rlquant.control.methods import parse_method
from rlquant.control.pieces import Memory
from rlquant.errors import InputError
from rlquant.measure import validate_results
from rlquant.quant import MixedScheme, QuantizedLayer, Scheme

Run = Callable[..., Any]
TINY = Distillation(rounds=1, steps=5, rollout_steps=100, selection_episodes=1)


def test_a_student_is_trained_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINED, "qat", TINY)
    agent, shelf, scheme = load("ppo-cartpole"), Memory(), MixedScheme.parse("w4a8")
    trained = Quantizer(agent, EnvPool(agent.env), pieces=shelf).quantize(scheme, "qat")
    monkeypatch.setattr("rlquant.control.quantizer.distill", None)  # a second training would fail
    kept = Quantizer(agent, EnvPool(agent.env), pieces=shelf).quantize(scheme, "qat")
    assert (kept.method, kept.precision, kept.sha256) == ("qat", "w4a8", agent.sha256)
    before, after = trained.actor.state_dict(), kept.actor.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_names_of_trained_methods() -> None:
    assert parse_method("distill").trains
    assert not parse_method("center+gptq").trains
    with pytest.raises(InputError, match="combines with nothing"):
        parse_method("center+distill")
    with pytest.raises(InputError, match="cannot do nf4; these can: rtn"):
        parse_method("qat").check(MixedScheme.parse("nf4"))
    with pytest.raises(InputError, match="Did you mean 'distill'"):
        parse_method("distil")
    with pytest.raises(InputError, match=r"use rlquant\.control\.Quantizer"):
        quantize_agent(load("ppo-cartpole"), "int4", method="qat")


def test_each_layer_gets_its_scheme_and_the_artifact_remembers(tmp_path: Path) -> None:
    agent = load("ppo-cartpole")
    name = "w4a4+trunk.2=int3+trunk.4=fp32"
    mixed = quantize_agent(agent, name, inputs=collect(agent, 1, seed=1))
    schemes = {
        path: layer.scheme.name
        for path, layer in mixed.actor.named_modules()
        if isinstance(layer, QuantizedLayer)
    }
    assert schemes == {"trunk.0": "w4a8", "trunk.2": "int3"}  # observations keep 8 bits
    assert mixed.precision == name
    save_artifact(mixed, tmp_path)
    restored = load_artifact(tmp_path)
    inputs = collect(agent, 1, seed=2)
    np.testing.assert_array_equal(
        restored.actor and inputs.outputs(restored.actor), inputs.outputs(mixed.actor)
    )
    narrow = quantize_agent(agent, "w4a4+trunk.0=w4a4", inputs=inputs)
    assert narrow.actor.get_submodule("trunk.0").scheme.name == "w4a4"  # unless named


def test_a_student_of_mixed_precision() -> None:
    student = distill_agent(load("sac-pendulum"), "w4a8+trunk.4=w8a8", settings=TINY)
    assert student.actor.get_submodule("trunk.4").scheme == Scheme.parse("w8a8")
    assert student.actor.get_submodule("trunk.2").scheme == Scheme.parse("w4a8")


@pytest.mark.parametrize("name", ["w4a8+trunk.0", "w4a8+=int8", "+trunk.0=int8", "w4a8+trunk.0=int9z"])
def test_misspelt_mixed_schemes(name: str) -> None:
    with pytest.raises(InputError):
        MixedScheme.parse(name)


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(InputError, match=r"trunk\.9.*trunk\.4"):
        quantize_agent(load("ppo-cartpole"), "int8+trunk.9=int4")


def test_names_of_mixed_schemes_come_back() -> None:
    mixed = MixedScheme(
        Scheme.parse("w4a8-g32"), (("trunk.0", Scheme.parse("int8")), ("t*", Scheme.parse("nf4")))
    )
    assert MixedScheme.parse(mixed.name) == mixed
    assert MixedScheme.of("w8a8") == MixedScheme(Scheme.parse("w8a8"))


def test_closed_loop_from_the_command_line(rlquant: Run, tmp_path: Path) -> None:
    options = ("--precisions", "w4a8", "--episodes", 5, "--calibration-episodes", 2, "--closed-loop", 2)
    done = rlquant("evaluate", "sac-pendulum", *options, "--out", tmp_path / "run")
    assert done.status == 0
    document = validate_results(json.loads((tmp_path / "run/results.json").read_text()))
    agent = load("sac-pendulum")
    expected = quantize_in_closed_loop(agent, "w4a8", rounds=2, episodes=2)
    assert document["rows"][1]["shifts"] == [shift.to_json() for shift in expected.shifts]
    assert "observations moved" in done.out
    assert rlquant("evaluate", "sac-pendulum", "--closed-loop", -1).status == 2


@pytest.mark.slow
def test_trained_methods_from_the_command_line(rlquant: Run, tmp_path: Path) -> None:
    done = rlquant(
        "evaluate",
        "ppo-cartpole",
        "--precisions",
        "w2a8",
        "--methods",
        "rtn,qat",
        "--episodes",
        10,
        "--out",
        tmp_path,
    )
    assert done.status == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    scores = {row["method"]: row["score"]["mean"] for row in rows}
    assert scores["qat"] > scores["rtn"] + 100
