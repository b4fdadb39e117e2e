"""A quantized student learns to act as its fp32 teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlquant.control import load, quantize_agent, rollout, save_artifact
from rlquant.control.distill import Distillation, distill
from rlquant.errors import InputError
from rlquant.quant import QuantizedLayer, Scheme

SHORT = Distillation(rounds=4, steps=300, rollout_steps=2048, selection_episodes=4)


@pytest.mark.slow
def test_distillation_wins_back_what_rounding_lost(tmp_path: Path) -> None:
    teacher = load("dqn-cartpole")
    before = {name: tensor.clone() for name, tensor in teacher.actor.state_dict().items()}
    rounded = quantize_agent(teacher, Scheme.parse("int4"))
    student = distill(teacher, "int4", settings=SHORT)
    lost, won = (rollout(agent, range(10), seed=0).returns.mean() for agent in (rounded, student))
    assert lost < 50
    assert won > 100  # after a tenth of the default budget
    assert (student.precision, student.method) == ("int4", "distill")
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.actor.state_dict().items())
    layers = [module for module in student.actor.modules() if isinstance(module, QuantizedLayer)]
    assert len(layers) == 3
    save_artifact(student, tmp_path)
    restored = rollout(load(tmp_path), range(3), seed=0).returns
    np.testing.assert_array_equal(restored, rollout(student, range(3), seed=0).returns)


def test_distillation_is_deterministic() -> None:
    teacher = load("sac-pendulum")
    tiny = Distillation(rounds=2, steps=20, rollout_steps=200, selection_episodes=1)
    first, second = (distill(teacher, "w4a8", settings=tiny).actor.state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bad_settings_are_refused() -> None:
    teacher = load("ppo-cartpole")
    with pytest.raises(InputError, match="at least 1 for rounds"):
        Distillation(rounds=0)
    with pytest.raises(InputError, match="quantized to int8 already"):
        distill(quantize_agent(teacher, Scheme.parse("int8")), "int4")
