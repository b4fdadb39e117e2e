"""The paired comparison: its ratio, its interval's coverage, its verdict and its call for more episodes."""

import math
from itertools import combinations_with_replacement

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rlquant.errors import InputError
from rlquant.measure import MORE_EPISODES_CAP, Retention, compare


def normal_pair(rng, n, ratio, *, random_score=20.0, gain=100.0, shared=30.0, own=10.0):
    """Paired normal scores [n] of true retention ``ratio``: luck of the episode plus luck of each policy."""
    luck = rng.normal(0, shared, n)
    reference = random_score + gain + luck + rng.normal(0, own, n)
    candidate = random_score + ratio * gain + luck + rng.normal(0, own, n)
    return reference, candidate


def fieller(reference, candidate, random_score, confidence=0.95):
    """Fieller's exact interval for the ratio of two correlated normal means, from its quadratic equation."""
    a, b, n = candidate - random_score, reference - random_score, len(reference)
    t = scipy.stats.t.ppf(0.5 + confidence / 2, n - 1)
    cov = np.cov(a, b) / n
    roots = np.roots(
        [
            b.mean() ** 2 - t**2 * cov[1, 1],
            -2 * (a.mean() * b.mean() - t**2 * cov[0, 1]),
            a.mean() ** 2 - t**2 * cov[0, 0],
        ]
    )
    return tuple(np.sort(roots.real))


@pytest.mark.parametrize(("n", "ratio"), [(20, 0.9), (100, 1.0), (400, 0.3)])
def test_interval_is_fiellers_on_normal_scores(n, ratio):
    reference, candidate = normal_pair(np.random.default_rng(n), n, ratio)
    exact = fieller(reference, candidate, 20.0)
    width = exact[1] - exact[0]
    assert compare(reference, candidate, random_score=20.0).ci == pytest.approx(exact, abs=0.08 * width)


def test_pairing_is_scipys_paired_bootstrap():
    rng = np.random.default_rng(1)
    reference = rng.exponential(50, 300) + 50
    candidate = reference - rng.exponential(5, 300)

    def ratio(b, a, axis):
        return (a.mean(axis) - 10) / (b.mean(axis) - 10)

    theirs = scipy.stats.bootstrap(
        (reference, candidate),
        ratio,
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    ours = compare(reference, candidate, random_score=10.0).ci
    assert ours == pytest.approx(tuple(theirs), abs=0.05 * (theirs.high - theirs.low))


@pytest.mark.parametrize("n", [8, 20])
def test_interval_covers_the_true_ratio_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    covered = 0
    for i in range(1000):
        reference, candidate = normal_pair(rng, n, 0.9)
        low, high = compare(reference, candidate, random_score=20.0, resamples=1000, seed=i).ci
        covered += low <= 0.9 <= high
    assert 0.93 <= covered / 1000 <= 0.97  # +-3 standard errors of 1000 trials


def test_a_policy_on_the_line_is_rarely_called_retained_or_lost():
    rng = np.random.default_rng(9)
    verdicts = []
    for i in range(600):
        reference, candidate = normal_pair(rng, 20, 0.98)
        verdicts.append(compare(reference, candidate, random_score=20.0, resamples=1000, seed=i).verdict)
    for verdict in ("retained", "lost"):
        assert verdicts.count(verdict) / 600 <= 0.045  # each tail is 2.5%; + 3 standard errors


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 30),
    ratio=st.floats(-0.5, 1.5),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-1e3, 1e3),
)
def test_retention_does_not_depend_on_the_unit_or_the_zero_of_the_score(seed, n, ratio, scale, shift):
    reference, candidate = normal_pair(np.random.default_rng(seed), n, ratio)
    before = compare(reference, candidate, random_score=20.0, resamples=200)
    after = compare(
        scale * reference + shift,
        scale * candidate + shift,
        random_score=scale * 20.0 + shift,
        resamples=200,
    )
    assert after.value == pytest.approx(before.value, rel=1e-6, abs=1e-6, nan_ok=True)
    assert after.ci == pytest.approx(before.ci, rel=1e-6, abs=1e-6, nan_ok=True)
    assert after.verdict == before.verdict


def test_value_is_the_ratio_of_gains_over_random():
    assert compare([-100.0] * 9, [-325.0] * 9, random_score=-1000.0).value == 0.75


def test_equal_scores_are_retained_exactly():
    result = compare([500.0] * 20, [500.0] * 20, random_score=22.0, margin=0.0)
    assert (result.value, result.ci, result.verdict) == (1.0, (1.0, 1.0), "retained")
    assert result.more_episodes is None


def test_the_reference_retains_itself_by_definition():
    result = Retention.of_reference()
    assert (result.value, result.ci, result.verdict) == (1.0, (1.0, 1.0), "retained")


def test_a_constant_loss_within_the_margin_is_retained_up_to_the_line_and_lost_beyond():
    reference = np.full(20, 500.0)
    assert compare(reference, reference * 0.98, random_score=0.0).verdict == "retained"
    assert compare(reference, reference * 0.9799, random_score=0.0).verdict == "lost"


def test_a_clear_loss_is_lost():
    candidate = np.random.default_rng(0).normal(59, 10, 20)
    result = compare(np.full(20, 500.0), candidate, random_score=22.0)
    assert result.verdict == "lost"
    assert result.ci[1] < 0.1


def test_a_candidate_worse_than_random_has_negative_retention():
    rng = np.random.default_rng(0)
    result = compare(rng.normal(100, 5, 20), rng.normal(-50, 5, 20), random_score=0.0)
    assert result.value == pytest.approx(-0.5, abs=0.1)
    assert result.verdict == "lost"


@pytest.mark.parametrize("mean", [-50.0, 20.0, 22.0])
def test_a_reference_no_better_than_random_decides_nothing(mean):
    rng = np.random.default_rng(1)
    result = compare(rng.normal(mean, 10, 20), rng.normal(0, 10, 20), random_score=20.0)
    assert result.verdict == "undecided"
    assert math.isnan(result.value)
    assert all(math.isnan(end) for end in result.ci)
    assert "not clearly better than random" in result.reason


@pytest.mark.parametrize("score", [0.0, -7.5, 20.0])
def test_a_constant_reference_at_the_random_score_is_not_divided_by(score):
    result = compare([score] * 10, [score + 1] * 10, random_score=score)
    assert result.verdict == "undecided"
    assert math.isnan(result.value)
    assert result.more_episodes is None


def exact_mass(reference, candidate, keep):
    """Probability, over all n**n resamples, that the ratio satisfies ``keep`` or has no reference gain."""
    n = len(reference)
    counts = np.array([np.bincount(c, minlength=n) for c in combinations_with_replacement(range(n), n)])
    weight = scipy.stats.multinomial.pmf(counts, n, np.full(n, 1 / n))
    gain, reference_gain = counts @ candidate, counts @ reference
    return weight[(reference_gain <= 0) | keep(gain / reference_gain)].sum()


def test_resamples_without_reference_gain_only_widen_the_interval():
    # one resample in fifty draws no episode with gain: its ratio would have the wrong sign
    reference = np.array([-1.0, -1.1, -0.9, -1.2, 8.0, 9.0, 10.0])
    candidate = reference * 0.8 + np.array([0.3, -1.0, 0.9, -0.2, 0.6, -0.9, 0.1])
    low, high = compare(reference, candidate, random_score=0.0, confidence=0.85, resamples=200_000).ci
    tail = scipy.stats.norm.cdf(-math.sqrt(7 / 6) * scipy.stats.t.ppf(0.925, 6))
    assert (4 / 7) ** 7 < tail < 2 * (4 / 7) ** 7  # they matter: more than half of each tail
    noise = 0.002  # of 200000 resamples: 4 standard errors
    assert exact_mass(reference, candidate, lambda r: r < low - 1e-9) <= tail + noise
    assert exact_mass(reference, candidate, lambda r: r <= low + 1e-9) >= tail - noise
    assert exact_mass(reference, candidate, lambda r: r > high + 1e-9) <= tail + noise
    assert exact_mass(reference, candidate, lambda r: r >= high - 1e-9) >= tail - noise


def test_one_episode_has_a_ratio_and_no_interval():
    result = compare([500.0], [490.0], random_score=0.0)
    assert result.value == 0.98
    assert all(math.isnan(end) for end in result.ci)
    assert (result.verdict, result.more_episodes) == ("undecided", 4)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_too_few_episodes_never_decide(n):
    # with 4 episodes, 1 resample in 256 repeats one episode 4 times, and an 95% interval needs rarer ones
    result = compare([500.0] * n, [500.0] * n, random_score=0.0)
    assert (result.verdict, result.more_episodes) == ("undecided", 5 - n)
    assert "too few" in result.reason


@pytest.mark.parametrize("ratio", [0.85, 0.9, 1.03, 1.06])
def test_as_many_more_episodes_as_asked_for_decide(ratio):
    """Adding `more_episodes` fresh ones from the same policies decides about four times out of five.

    Not exactly: the true ratio is not the measured one, which was near enough to the line to be undecided.
    """
    rng = np.random.default_rng(int(ratio * 100))
    asked, decided = 0, 0
    for i in range(200):
        reference, candidate = normal_pair(rng, 20, ratio, shared=20, own=15)
        first = compare(reference, candidate, random_score=20.0, resamples=500, seed=i)
        if first.verdict != "undecided" or first.more_episodes == MORE_EPISODES_CAP:
            continue
        more = normal_pair(rng, first.more_episodes, ratio, shared=20, own=15)
        second = compare(
            np.append(reference, more[0]),
            np.append(candidate, more[1]),
            random_score=20.0,
            resamples=500,
            seed=i,
        )
        asked += 1
        decided += second.verdict != "undecided"
    assert asked >= 20
    assert decided / asked >= 0.7


@pytest.mark.parametrize("ratio", [0.95, 1.0])
def test_more_episodes_is_about_the_smallest_number_that_decides(ratio):
    """With the ratio held fixed (the same episodes again), 0.4 of the total is too few and all decides."""
    rng = np.random.default_rng(5)
    reference, candidate = normal_pair(rng, 40, ratio, own=20)
    candidate += (ratio - compare(reference, candidate, random_score=20.0).value) * (reference.mean() - 20)
    more = compare(reference, candidate, random_score=20.0).more_episodes

    def verdict_with(total):
        repeated = np.arange(40 * round(total / 40)) % 40
        return compare(reference[repeated], candidate[repeated], random_score=20.0).verdict

    assert more > 100
    assert verdict_with(0.4 * (40 + more)) == "undecided"
    assert verdict_with(40 + more) == ("lost" if ratio < 0.98 else "retained")


def test_a_ratio_on_the_line_is_capped_and_says_so():
    reference = np.tile([90.0, 110.0], 10)
    candidate = 98.0 + np.tile([9.0, -9.0], 10)
    result = compare(reference, candidate, random_score=0.0)
    assert result.value == pytest.approx(0.98)
    assert (result.verdict, result.more_episodes) == ("undecided", MORE_EPISODES_CAP)
    assert "might not decide" in result.reason


def test_the_same_input_gives_the_same_result():
    reference, candidate = normal_pair(np.random.default_rng(0), 20, 0.97)
    first = compare(reference, candidate, random_score=20.0)
    assert compare(reference, candidate, random_score=20.0) == first
    assert compare(reference, candidate, random_score=20.0, seed=1).ci != first.ci


@pytest.mark.parametrize(
    ("reference", "candidate", "options", "message"),
    [
        ([1.0, 2.0], [1.0], {}, "same episode seeds"),
        ([], [], {}, "no episode"),
        ([1.0, math.nan], [1.0, 2.0], {}, "reference holds nan at episode 1"),
        ([1.0, 2.0], [1.0, -math.inf], {}, "candidate holds -inf"),
        ([1.0, 2.0], [1.0, 2.0], {"random_score": math.nan}, "random_score"),
        ([1.0, 2.0], [1.0, 2.0], {"margin": 1.0}, "margin"),
        ([1.0, 2.0], [1.0, 2.0], {"margin": -0.1}, "margin"),
        ([1.0, 2.0], [1.0, 2.0], {"confidence": 1.0}, "confidence"),
    ],
)
def test_bad_input_is_named(reference, candidate, options, message):
    with pytest.raises(InputError, match=message):
        compare(reference, candidate, **({"random_score": 0.0} | options))
