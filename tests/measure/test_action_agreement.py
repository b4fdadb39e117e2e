"""Action agreement and the Q-gap on cases checked by hand, and the flip bound on random ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlquant.errors import InputError
from rlquant.measure import action_agreement, q_gap


def test_discrete_actions_agree_when_equal():
    agreement = action_agreement([0, 1, 2, 1], [0, 1, 1, 1], True)
    assert (agreement.action, agreement.max_abs) == (0.75, None)


def test_multidiscrete_actions_agree_when_every_branch_does():
    assert action_agreement([[0, 1], [2, 3], [4, 5]], [[0, 1], [2, 0], [0, 5]], True).action == pytest.approx(
        1 / 3
    )


def test_max_abs_of_discrete_actions_is_the_error_of_the_head():
    agreement = action_agreement(
        [0], [0], True, reference_outputs=[[1.0, 2.0]], candidate_outputs=[[1.5, 1.75]]
    )
    assert (agreement.action, agreement.max_abs) == (1.0, 0.5)


def test_continuous_actions_agree_within_a_hundredth_of_the_action_space():
    reference = np.array([[0.0, 0.0], [1.0, 10.0], [-1.0, -10.0]])
    candidate = reference + np.array([[0.019, 0.19], [0.021, 0.0], [0.0, 0.21]])
    agreement = action_agreement(reference, candidate, False, low=[-1, -10], high=[1, 10])
    assert agreement.action == pytest.approx(1 / 3)
    assert agreement.max_abs == pytest.approx(0.21)


def test_unbounded_continuous_actions_are_judged_by_the_reference_range():
    reference = np.linspace(0, 10, 11)
    candidate = reference + np.where(np.arange(11) < 3, 0.11, 0.09)
    for bounds in ({}, {"low": -np.inf, "high": np.inf}):
        assert action_agreement(reference, candidate, False, **bounds).action == pytest.approx(8 / 11)


def test_equal_continuous_actions_agree_even_without_range():
    assert action_agreement(np.zeros((4, 2)), np.zeros((4, 2)), False).action == 1.0


def test_q_gap_is_best_minus_second_best_whatever_the_order():
    gap = q_gap([[1.0, 5.0, 3.0], [7.0, 0.0, 7.0], [-1.0, -2.0, -9.0]])
    assert gap.p50 == 1.0  # the gaps are 2, 0 and 1
    assert gap.may_flip is None


def test_an_offset_common_to_all_actions_flips_nothing():
    q = np.array([[1.0, 2.0], [4.0, 3.0]])
    assert q_gap(q, q + 100).may_flip == 0.0


def test_states_whose_gap_is_below_the_error_of_a_difference_may_flip():
    q = np.array([[0.0, 0.1], [0.0, 0.3], [0.0, 9.0], [0.0, 9.0]])
    candidate = q + np.array([[0.0, 0.0], [0.0, 0.0], [0.1, -0.1], [0.0, 0.0]])  # the largest spread is 0.2
    assert q_gap(q, candidate).may_flip == 0.25


@given(st.integers(0, 10_000), st.floats(0.001, 1.0))
def test_every_state_that_does_flip_is_among_those_that_may(seed, noise):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(50, 4))
    candidate = q + rng.normal(0, noise, q.shape)
    assert (q.argmax(1) != candidate.argmax(1)).mean() <= q_gap(q, candidate).may_flip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: action_agreement([0, 1], [0], True), r"reference \[2\], candidate \[1\]"),
        (lambda: action_agreement([], [], True), "no actions"),
        (
            lambda: action_agreement(
                [0], [0], True, reference_outputs=[[1.0]], candidate_outputs=[[1.0, 2.0]]
            ),
            "outputs differ",
        ),
        (lambda: q_gap([[1.0], [2.0]]), "actions >= 2"),
        (lambda: q_gap([[1.0, 2.0]], [[1.0, 2.0, 3.0]]), "Q values differ"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
