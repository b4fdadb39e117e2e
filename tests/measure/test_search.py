"""The search for the cheapest scheme, on policies whose truth is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlquant.measure import PROOFS, Goal, Search, Trial, audition, compare, proof_confidence
from rlquant.quant import Step, greedy_ladder


class Known:
    """Schemes ``s0``, ``s1`` ... of 100, 200 ... bytes, each of which truly keeps a known share of the reward."""

    kept, unit = "the reward", "audition episodes"

    def __init__(self, truth: Sequence[float], *, lucky: frozenset[str] = frozenset()) -> None:
        self.truth = {f"s{index}": share for index, share in enumerate(truth)}
        self.sizes = {name: 100 * (index + 1) for index, name in enumerate(self.truth)}
        self.lucky, self.tried, self.proofs = lucky, list[str](), list[list[str]]()

    def audition(self, scheme: str, method: str) -> Trial:
        self.tried.append(scheme)
        kept = 1.0 if scheme in self.lucky else self.truth[scheme]
        return Trial(scheme, method, self.sizes[scheme], kept, 8, kept >= 0.98)

    def prove(self, trials: Sequence[Trial]) -> dict[str, Any]:
        self.proofs.append([trial.scheme for trial in trials])
        reference = np.full(20, 50.0) + np.arange(20)
        rows: list[dict[str, Any]] = [{"precision": "fp32", "bytes": {"weights": 1600}}]
        for trial in trials:
            found = compare(reference, self.truth[trial.scheme] * reference, random_score=0.0)
            rows.append(
                {"precision": trial.scheme, "retention": vars(found), "bytes": {"weights": trial.bytes}}
            )
        return {"rows": rows}


@given(truth=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=12).map(sorted))
def test_the_cheapest_that_holds_is_found_where_more_bytes_never_hurt(truth: list[float]) -> None:
    known = Known(truth)
    outcome = Search(Goal(0.98), known, methods=["rtn"]).run(known.sizes)
    holding = [name for name, share in known.truth.items() if share >= 0.98]
    assert outcome.held == bool(holding)
    if holding:
        assert outcome.chosen.scheme == holding[0]
    assert known.truth[outcome.chosen.scheme] == max(known.truth[name] for name in known.proofs[-1])
    assert len(known.tried) <= math.ceil(math.log2(len(truth) + 1))
    assert known.proofs == [[outcome.chosen.scheme]]


def test_what_was_lucky_in_its_audition_is_not_proved_and_a_dearer_one_is() -> None:
    known = Known([0.5, 0.7, 0.99, 1.0], lucky=frozenset({"s1"}))  # s2 was auditioned on the way
    outcome = Search(Goal(0.98), known, methods=["rtn"]).run(known.sizes)
    assert known.proofs == [["s1"], ["s1", "s2"]]
    assert (outcome.held, outcome.chosen.scheme) == (True, "s2")
    assert any("s1 by rtn is not proved" in sentence for sentence in outcome.reasons)
    known = Known([0.5, 0.6, 0.7, 0.99, 1.0], lucky=frozenset({"s2"}))  # and here nothing dearer was
    outcome = Search(Goal(0.98), known, methods=["rtn"]).run(known.sizes)
    assert known.proofs == [["s2"], ["s2", "s3"]]
    assert (outcome.held, outcome.chosen.scheme) == (True, "s3")


def test_luck_is_followed_up_the_ladder_in_ever_longer_steps_and_not_for_ever() -> None:
    known = Known(
        [0.9 + 0.001 * index for index in range(20)], lucky=frozenset(f"s{index}" for index in range(9, 20))
    )
    outcome = Search(Goal(0.98), known, methods=["rtn"]).run(known.sizes)
    assert known.proofs[-1] == ["s9", "s10", "s11", "s13"]
    assert (outcome.held, outcome.chosen.scheme) == (False, "s13")
    assert "misses the reward by 6.7 points" in outcome.reasons[-1]


def test_limits_of_memory() -> None:
    known = Known([0.5, 0.9, 0.99, 1.0])
    outcome = Search(Goal(0.98, memory=250), known, methods=["rtn"]).run(known.sizes)
    assert set(known.tried) <= {"s0", "s1"}
    assert (outcome.held, outcome.chosen.scheme) == (False, "s1")
    assert outcome.reasons[0] == "2 of 4 schemes do not fit into 250 bytes"
    nothing = Search(Goal(0.98, memory=40), known, methods=["rtn"]).run(known.sizes)
    assert nothing.reasons[0] == "even s0 takes 100 bytes, 60 too many"
    assert nothing.reasons[-1].endswith("misses the reward by 48.0 points and the memory by 60 bytes")


def test_proofs_share_the_error() -> None:
    assert PROOFS * (1 - proof_confidence(0.95)) == pytest.approx(0.05)


@pytest.mark.parametrize(("share", "heard"), [(1.0, (8, True)), (0.5, (8, False)), (0.9805, (32, True))])
def test_an_audition_goes_on_only_where_it_is_doubtful(share: float, heard: tuple[int, bool]) -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(10, 1, 32)
    noise = rng.normal(0, 0.1, 32)
    candidate = share * reference + (noise - noise.mean() if share not in (1.0, 0.5) else 0)
    found = audition(
        lambda count: (reference[:count], candidate[:count]), random_score=0, retain=0.98, stages=(8, 32)
    )
    assert (found.episodes, found.passed) == heard


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_a_ladder_goes_down_one_cheapest_step_at_a_time(drawn: list[list[tuple[int, float]]]) -> None:
    parts = {}
    for index, steps in enumerate(drawn):
        falling = np.cumsum([size for size, _ in steps])[::-1]
        parts[f"p{index}"] = [Step(float(b), cost) for b, (_, cost) in zip(falling, steps, strict=True)]
    rungs = greedy_ladder(parts)
    assert set(rungs[0].values()) == {0}
    assert rungs[-1] == {name: len(steps) - 1 for name, steps in parts.items()}
    for upper, lower in itertools.pairwise(rungs):
        prices = {}
        for name, steps in parts.items():
            if upper[name] + 1 < len(steps):
                here, below = steps[upper[name]], steps[upper[name] + 1]
                prices[name] = max(0.0, below.cost - here.cost) / (here.bytes - below.bytes)
        (moved,) = [name for name in parts if lower[name] != upper[name]]
        assert lower[moved] == upper[moved] + 1
        assert prices[moved] == min(prices.values())
