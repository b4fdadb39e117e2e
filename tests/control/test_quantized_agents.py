"""Folding, artifacts and plain torch modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_models import MODELS, env_id, vec_env
from torch import nn

from rlquant.control import (
    Agent,
    Normaliser,
    Session,
    collect,
    from_sb3,
    load,
    quantize_agent,
    rollout,
    save_artifact,
)
from rlquant.control.actor import Actor
from rlquant.control.quantize import float_twin, fold_observation_ranges_, use_whole_grid
from rlquant.errors import InputError
from rlquant.quant import MixedScheme, QuantizedLayer, Scheme


@given(seed=st.integers(0, 10_000), spread=st.floats(0.01, 1000.0), recurrent=st.booleans())
@settings(max_examples=25, deadline=None)
def test_folding_the_observation_ranges_changes_no_output(seed: int, spread: float, recurrent: bool) -> None:
    torch.manual_seed(seed)
    rnn = nn.LSTM(5, 6) if recurrent else None
    trunk = nn.Sequential(nn.Linear(6 if recurrent else 5, 7), nn.Tanh(), nn.Linear(7, 2))
    actor = Actor({"": nn.Sequential(nn.Flatten())}, trunk.double(), rnn.double() if rnn else None)
    x = torch.randn(20, 5, dtype=torch.float64) * torch.tensor([1, spread, 0, 1 / spread, 3]) + 2
    folded = copy.deepcopy(actor)
    with torch.no_grad():
        fold_observation_ranges_(folded, {"": x})
        before, after = actor({"": x})[0], folded({"": x})[0]
        mapped = folded.encoder("")(x)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert mapped.min() >= 0  # a constant feature sits at the end of its empty range
    assert mapped.max() < 1


@pytest.mark.parametrize(
    "scheme", ["bf16", "int8", "int3-g8", "nf4", "w8a8", "w4a8-g16-asym", "w8a8-dynamic"]
)
@pytest.mark.parametrize("name", ["ppo", "ppo-cnn", "ppo-dict", "recurrent", "qrdqn", "sac-sde"])
def test_an_artifact_acts_as_the_agent_that_was_saved(name: str, scheme: str, tmp_path: Path) -> None:
    observation, action, build = MODELS[name]
    agent = from_sb3(build(vec_env(observation, action)), env=env_id(observation, action))
    quantized = quantize_agent(agent, Scheme.parse(scheme), inputs=collect(agent, 2, seed=1))
    total = save_artifact(quantized, tmp_path / "artifact")
    assert total == sum(path.stat().st_size for path in (tmp_path / "artifact").iterdir())
    restored = load(tmp_path / "artifact")
    assert (restored.precision, restored.method) == (scheme, "rtn")
    assert restored.parameters == agent.parameters
    inputs = collect(agent, 1, seed=2)
    np.testing.assert_array_equal(inputs.outputs(restored.actor), inputs.outputs(quantized.actor))


def test_the_agent_itself_is_left_alone() -> None:
    agent = load("ppo-cartpole")
    before = copy.deepcopy(agent.actor.state_dict())
    quantized = quantize_agent(agent, Scheme.parse("w4a8"), inputs=collect(agent, 1, seed=1))
    assert any(isinstance(module, QuantizedLayer) for module in quantized.actor.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.actor.state_dict().items())


def test_a_normaliser_travels_with_the_artifact(zoo: Path, tmp_path: Path) -> None:
    agent = load(zoo / "ppo/Hopper-v3_1")
    save_artifact(quantize_agent(agent, Scheme.parse("int8")), tmp_path)
    restored = load(tmp_path)
    expected, found = agent.parts[""].normaliser, restored.parts[""].normaliser
    assert expected is not None
    assert found is not None
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.var, expected.var)
    assert (found.clip, found.epsilon) == (expected.clip, expected.epsilon)


def damage(folder: Path, kind: str) -> None:
    document, tensors = folder / "policy.json", folder / "policy.safetensors"
    if kind == "flipped":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif kind == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif kind == "missing":
        tensors.unlink()
    elif kind == "no json":
        document.write_text("{")
    else:
        fields = json.loads(document.read_text())
        if kind == "newer":
            fields["schema"] = "rlquant.policy/9"
        else:
            fields["actor"]["trunk"][0]["out_features"] += 1
        document.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    "kind", ["flipped", "truncated", "missing", "no json", "newer", "other architecture"]
)
def test_damaged_artifacts_are_refused(kind: str, tmp_path: Path) -> None:
    save_artifact(quantize_agent(load("ppo-cartpole"), Scheme.parse("int8")), tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(InputError, match="policy"):
        load(tmp_path)


def test_an_artifact_is_evaluated_against_the_agent_it_was_made_from(
    rlquant: Callable[..., Any], tmp_path: Path
) -> None:
    artifact, run = tmp_path / "artifact", tmp_path / "run"
    assert rlquant("quantize", "ppo-cartpole", "--scheme", "w8a8", "--out", artifact).status == 0
    again = rlquant("quantize", artifact, "--scheme", "int4", "--out", tmp_path / "b")
    assert again.status == 2
    assert "quantized to w8a8 already" in again.err
    budget = ("--precisions", "w8a8", "--episodes", 3, "--out", run)
    assert rlquant("evaluate", artifact, *budget).status == 0
    rows = json.loads((run / "results.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "w8a8", "w8a8"]
    assert rows[1]["score"] == rows[2]["score"]
    assert rows[1]["bytes"]["weights"] == rows[2]["bytes"]["weights"]
    other = rlquant("evaluate", artifact, "--reference", "dqn-cartpole", *budget)
    assert other.status == 2
    assert "--reference" in other.err


class CleanRLActor(nn.Module):
    """An actor as CleanRL's scripts write it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * self.network(x)


def test_a_plain_torch_module_acts_and_is_quantized() -> None:
    torch.manual_seed(0)
    module = CleanRLActor()
    normaliser = Normaliser(np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0]))
    agent = Agent.from_module(module, env="Pendulum-v1", normaliser=normaliser)
    env = gym.make("Pendulum-v1")
    observation, _ = env.reset(seed=0)
    shown = (observation - normaliser.mean) / np.sqrt(normaliser.var + 1e-8)
    with torch.no_grad():
        expected = module(torch.as_tensor(shown, dtype=torch.float32)[None]).clamp(-2, 2)[0].numpy()
    np.testing.assert_allclose(agent.act(observation), expected, atol=1e-6)
    quantized = quantize_agent(agent, Scheme.parse("w8a8"), inputs=collect(agent, 1, seed=0))
    assert abs(float(quantized.act(observation)[0]) - float(expected[0])) < 0.05


def test_modules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="does not take observations"):
        Agent.from_module(nn.Linear(5, 2), env="CartPole-v1")
    with pytest.raises(InputError, match=r"puts out \[2, 3\]"):
        Agent.from_module(nn.Linear(4, 3), env="CartPole-v1")
    with pytest.raises(InputError, match="a tanh head cannot act"):
        Agent.from_module(nn.Linear(4, 2), env="CartPole-v1", head="tanh")


def test_nan_observations_are_refused() -> None:
    agent = load("ppo-cartpole")
    with pytest.raises(InputError, match="holds NaN"):
        agent.act(np.array([0, np.nan, 0, 0], np.float32))


def test_one_action_at_a_time_needs_no_memory(zoo: Path) -> None:
    observation, action, build = MODELS["recurrent"]
    agent = from_sb3(build(vec_env(observation, action)), env=env_id(observation, action))
    with pytest.raises(InputError, match="has memory"):
        agent.act(np.zeros(5, np.float32))
    assert Session(agent, rows=1).act(np.zeros((1, 5), np.float32), np.ones(1, bool)).shape == (1, 2)


def test_centring_an_argmax_head_changes_no_action_and_wins_back_bits(zoo: Path) -> None:
    agent = load(zoo / "dqn/CartPole-v1_1")
    scheme = Scheme.parse("int6-g32")
    inputs = collect(agent, 4, seed=1)
    centred = float_twin(agent, MixedScheme(scheme), None, center=True)
    expected = inputs.outputs(agent.actor)
    np.testing.assert_array_equal(inputs.outputs(centred).argmax(1), expected.argmax(1))

    def score(method: str) -> float:
        return float(rollout(quantize_agent(agent, scheme, method=method), range(10), seed=0).returns.mean())

    assert score("center") > 450 > score("rtn")
    with pytest.raises(InputError, match="exact for an argmax head only"):
        quantize_agent(load("sac-pendulum"), scheme, method="center")


def test_methods_are_compared_and_what_cannot_be_done_is_left_out(
    rlquant: Callable[..., Any], tmp_path: Path
) -> None:
    budget = ("--precisions", "int4,w4a8", "--episodes", 2, "--out", tmp_path)
    done = rlquant("evaluate", "ppo-cartpole", "--methods", "rtn,center+gptq+bias,smoothquant", *budget)
    assert done.status == 0
    assert "smoothquant cannot do int4; left out" in done.err
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["precision"], row["method"]) for row in rows] == [
        ("fp32", "none"),
        ("int4", "rtn"),
        ("int4", "center+gptq+bias"),
        ("w4a8", "rtn"),
        ("w4a8", "center+gptq+bias"),
        ("w4a8", "smoothquant"),
    ]
    none = rlquant("evaluate", "ppo-cartpole", "--method", "smoothquant", *budget)
    assert none.status == 2
    assert "cannot do int4" in none.err
    assert rlquant("evaluate", "ppo-cartpole", "--method", "gtpq", *budget).status == 2


def test_the_first_grid_reaches_as_far_as_the_scaled_observations() -> None:
    agent = load("sac-pendulum")
    quantized = quantize_agent(agent, "w8a8", inputs=collect(agent, 1, seed=1))
    first: Any = quantized.actor.get_submodule("trunk.0")
    assert first.input_quant.scale == pytest.approx(1 / 255)
    first.input_scale, first.outlier_index = (
        torch.tensor([0.5, 2.0, 9.0]),
        torch.tensor([2], dtype=torch.int32),
    )
    use_whole_grid(quantized.actor)
    assert first.input_quant.scale == pytest.approx(2 / 255)
