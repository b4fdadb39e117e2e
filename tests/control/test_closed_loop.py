"""Calibration on what the quantized policy itself meets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import torch

from rlquant.control import Inputs, load, quantize_agent, rollout
from rlquant.control.closed_loop import observation_shift, quantize_in_closed_loop
from rlquant.errors import InputError
from rlquant.quant import Scheme


def inputs(x: np.ndarray) -> Inputs:
    return Inputs({"": torch.from_numpy(x.astype(np.float32))}, None)


def test_the_shift_is_scipys_wasserstein_in_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal([0, 5, -2], [1, 3, 0.1], (500, 3))
    after = rng.normal([0.5, 5, -2], [1, 6, 0.1], (321, 3))
    shift = observation_shift(inputs(before), inputs(after))
    before, after = before.astype(np.float32).astype(float), after.astype(np.float32).astype(float)
    for column in range(3):
        a, b = before[:, column], after[:, column]
        expected = scipy.stats.wasserstein_distance(a, b) / a.std()
        assert shift.wasserstein[""][column] == pytest.approx(expected, rel=1e-6)
        assert shift.mean[""][column] == pytest.approx((b.mean() - a.mean()) / a.std(), abs=1e-6)
        assert shift.outside[""][column] == np.mean((b < a.min()) | (b > a.max()))
    assert shift.worst == shift.wasserstein[""].max()
    assert json.loads(json.dumps(shift.to_json()))["outside"][""] == shift.outside[""].tolist()


def test_equal_episodes_have_not_moved_and_constants_are_measured_as_they_are() -> None:
    x = np.array([[1.0, 2.0], [3.0, 2.0]])
    still = observation_shift(inputs(x), inputs(x))
    assert still.worst == 0
    assert still.share_outside == 0
    moved = observation_shift(inputs(x), inputs(x + np.array([0.0, 0.5])))
    assert moved.wasserstein[""].tolist() == [0.0, 0.5]
    assert moved.outside[""].tolist() == [0.0, 1.0]
    assert moved.share_outside == 0.5


def test_the_loop_calibrates_on_what_the_quantized_policy_meets() -> None:
    agent = load("dqn-cartpole")
    plain = quantize_in_closed_loop(agent, "w4a4", rounds=2, episodes=4)
    assert len(plain.shifts) == 2
    assert plain.shifts[0].worst > 0.1  # at 4 bits it goes elsewhere
    again = quantize_agent(agent, Scheme.parse("w4a4"), inputs=plain.inputs)
    np.testing.assert_array_equal(
        rollout(again, range(4), seed=0).returns, rollout(plain.agent, range(4), seed=0).returns
    )
    alone = quantize_in_closed_loop(agent, "w4a4", rounds=1, episodes=4)
    assert len(alone.inputs.parts[""]) < len(plain.inputs.parts[""])
    np.testing.assert_array_equal(alone.shifts[0].wasserstein[""], plain.shifts[0].wasserstein[""])


def test_recurrent_states_are_merged_too() -> None:
    found = quantize_in_closed_loop(load("recurrentppo-cartpole"), "w8a8", episodes=1)
    rows = len(found.inputs.parts[""])
    assert [part.shape[1] for part in found.inputs.state] == [rows, rows]


def test_a_loop_of_no_rounds_is_refused() -> None:
    with pytest.raises(InputError, match="at least one round"):
        quantize_in_closed_loop(load("ppo-cartpole"), "w8a8", rounds=0)
