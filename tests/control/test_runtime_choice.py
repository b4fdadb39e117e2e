"""The runtime ``auto``: the fastest right one for each precision, and a word on what is passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from rlquant.control import Agent, EnvPool, collect, evaluate, load, quantize_agent, rollout
from rlquant.control.collect import raw_observations
from rlquant.control.compile import compile_agent
from rlquant.control.program_session import ProgramSession, runtime_of
from rlquant.control.runtimes import RuntimeChooser, is_simulated, stacked_observations
from rlquant.control.session import batch_of_one
from rlquant.deploy.auto import AUTOMATIC, choose_runtime
from rlquant.deploy.program import Program
from rlquant.deploy.runtime import make_runtime


@pytest.fixture(scope="module")
def cartpole() -> Agent:
    return load("ppo-cartpole")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "a-compiler-that-is-not-there")


def chooser(agent: Agent, runtime: str = "auto", device: str = "cpu") -> RuntimeChooser:
    return RuntimeChooser(agent, EnvPool(agent.env), seed=0, runtime=runtime, device=device)


def test_the_fastest_comes_first_and_no_gpu_is_taken_unasked(cartpole: Agent) -> None:
    assert AUTOMATIC[0] == "native"
    assert "cuda" not in AUTOMATIC
    quantized = quantize_agent(cartpole, "w8a8", inputs=collect(cartpole, 1, seed=1))
    for agent in (cartpole, quantized):
        assert (chooser(agent).choose(agent).name, chooser(agent).choose(agent).passed_over) == ("native", ())


def test_what_is_asked_for_is_taken(cartpole: Agent) -> None:
    assert chooser(cartpole, "torch").choose(cartpole).name == "torch"
    assert chooser(cartpole, "reference").choose(cartpole).name == "reference"
    assert chooser(cartpole, device="cuda:0").choose(cartpole).name == "torch"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_next_one_is_taken_with_a_word(
    rlquant: Callable[..., Any], tmp_path: Path
) -> None:
    options = ("--precisions", "w8a8,w8a8-dynamic", "--episodes", 2, "--out", tmp_path)
    done = rlquant("evaluate", "ppo-cartpole", *options)
    assert done.status == 0
    lines = [line for line in done.err.splitlines() if " in " in line]
    assert len(lines) == 2
    assert lines[0].startswith(
        "rlquant: fp32, w8a8 run in onnx: native is passed over: the runtime native needs a C compiler"
    )
    assert lines[1].startswith("rlquant: w8a8-dynamic runs in torch: ")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == ["onnx", "onnx", "torch"]


class Wrong:
    """A runtime that errs in the last bit of one output, or by a share of it."""

    def __init__(self, program: Program, share: float) -> None:
        self.runtime, self.share = make_runtime("reference", program), share

    def outputs(self, observations: Any) -> np.ndarray:
        outputs = self.runtime.outputs(observations)
        last = outputs[-1, 0]
        outputs[-1, 0] = last * (1 + self.share) if self.share else np.nextafter(last, np.float32(np.inf))
        return outputs


@pytest.mark.parametrize(
    ("scheme", "share", "taken"),
    [("w8a8", 0.0, False), ("fp32", 0.0, True), ("fp32", 0.01, False), ("fp32", np.nan, False)],
)
def test_a_wrong_runtime_is_passed_over(cartpole: Agent, scheme: str, share: float, taken: bool) -> None:
    agent = quantize_agent(cartpole, scheme, inputs=collect(cartpole, 1, seed=1))
    observations = stacked_observations(agent, raw_observations(agent, seed=0, count=16))

    def make(name: str, program: Program) -> Any:
        return Wrong(program, share) if name == "native" else make_runtime(name, program)

    choice = choose_runtime(compile_agent(agent), observations, make=make)
    assert (choice.name == "native") is taken
    if not taken:
        assert choice.passed_over[0].startswith("native is passed over: its outputs")
        assert "of 16 observations" in choice.passed_over[0]


def test_runtimes_are_compared_on_what_a_stacked_policy_sees() -> None:
    agent = load("cnn-catch")
    seen = raw_observations(agent, seed=3, count=6)
    session = ProgramSession(agent, 1, runtime=runtime_of(agent, "reference"))
    acted = []
    for step, observation in enumerate(seen):
        session.act(batch_of_one(observation), np.array([step == 0]))
        acted.append(session.outputs.copy())
    together = make_runtime("reference", compile_agent(agent)).outputs(stacked_observations(agent, seen))
    np.testing.assert_array_equal(np.concatenate(acted), together)


def test_each_row_names_the_runtime_that_played_it(cartpole: Agent) -> None:
    rows = evaluate(cartpole, ["w8a8", "w8a8-dynamic"], episodes=4)["rows"]
    assert [row["runtime"] for row in rows] == ["native", "native", "torch"]
    played = rollout(cartpole, range(4), seed=0, runtime="native").returns
    assert rows[0]["score"]["episodes"] == played.tolist()


def test_unpacked_weights_are_simulated(cartpole: Agent) -> None:
    expected = {
        "fp32": (False, False),
        "w8a8": (True, False),
        "bf16": (True, True),
        "int4-asym": (True, True),
    }
    for scheme, simulated in expected.items():
        agent = quantize_agent(cartpole, scheme, inputs=collect(cartpole, 1, seed=1))
        assert (is_simulated(agent, "torch"), is_simulated(agent, "native")) == simulated


def test_a_network_that_no_program_can_do_runs_in_torch() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    agent = Agent.from_module(module, env="CartPole-v1")
    choice = chooser(agent).choose(agent)
    assert choice.name == "torch"
    assert "LayerNorm" in choice.passed_over[0]
