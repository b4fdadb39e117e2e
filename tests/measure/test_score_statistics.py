"""Score statistics against SciPy and against what they promise."""

import math
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlquant.errors import InputError
from rlquant.measure import iqm, mean_interval, std, worst_decile

SCORES = arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e6, 1e6))


@given(SCORES)
def test_iqm_is_scipys_quarter_trimmed_mean(scores):
    assert iqm(scores) == pytest.approx(scipy.stats.trim_mean(scores, 0.25), rel=1e-12, abs=1e-6)


@pytest.mark.parametrize(("n", "worst"), [(1, 0.0), (9, 0.0), (10, 0.0), (11, 0.5), (20, 0.5), (100, 4.5)])
def test_worst_decile_is_the_mean_of_the_lowest_tenth_rounded_up(n, worst):
    scores = np.random.default_rng(0).permutation(n).astype(float)
    assert worst_decile(scores) == worst


@given(SCORES)
def test_worst_decile_never_exceeds_the_mean_and_std_is_the_sample_one(scores):
    assert worst_decile(scores) <= scores.mean() + 1e-6
    if scores.size > 1:
        assert std(scores) == pytest.approx(statistics.stdev(scores.tolist()), rel=1e-9, abs=1e-9)


def test_std_and_interval_of_one_episode_are_undefined():
    assert math.isnan(std([5.0]))
    assert all(math.isnan(end) for end in mean_interval([5.0]))


@pytest.mark.parametrize("n", [10, 30])
def test_interval_of_normal_scores_is_students(n):
    scores = np.random.default_rng(3).normal(100, 20, n)
    student = scipy.stats.t.interval(0.95, n - 1, scores.mean(), scipy.stats.sem(scores))
    # for these samples, skewness and resampling noise move an end by a few percent of the width
    assert mean_interval(scores) == pytest.approx(student, abs=0.06 * (student[1] - student[0]))


def test_interval_of_many_skewed_scores_is_scipys_percentile_bootstrap():
    scores = np.random.default_rng(4).exponential(10, 400)
    theirs = scipy.stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert mean_interval(scores) == pytest.approx(tuple(theirs), abs=0.04 * (theirs.high - theirs.low))


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(5)
    trials = [mean_interval(rng.normal(7, 3, 8), resamples=1000, seed=i) for i in range(1000)]
    covered = np.mean([low <= 7 <= high for low, high in trials])
    assert 0.93 <= covered <= 0.97  # +-3 standard errors of 1000 trials; the plain percentile covers 0.90


def test_interval_is_deterministic_and_seeded():
    scores = np.random.default_rng(6).normal(size=30)
    assert mean_interval(scores, seed=1) == mean_interval(scores, seed=1)
    assert mean_interval(scores, seed=1) != mean_interval(scores, seed=2)


def test_long_runs_are_resampled_in_bounded_memory():
    tracemalloc = pytest.importorskip("tracemalloc")
    scores = np.random.default_rng(7).normal(size=50_000)
    tracemalloc.start()
    mean_interval(scores, resamples=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6  # all resamples at once would take 320 MB


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "no episode"),
        ([1.0, math.nan], "nan at episode 1"),
        ([math.inf], "inf at episode 0"),
        ([[1.0]], r"\[episodes\]"),
    ],
)
@pytest.mark.parametrize("statistic", [iqm, std, worst_decile, mean_interval])
def test_bad_scores_are_named(statistic, scores, message):
    with pytest.raises(InputError, match=message):
        statistic(scores)


@pytest.mark.parametrize("wrong", [{"confidence": 0.0}, {"confidence": 95}, {"resamples": 0}])
def test_bad_settings_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        mean_interval([1.0, 2.0], **wrong)
