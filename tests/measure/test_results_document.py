"""Rows and documents of results.json: the contract's keys, plain JSON, and errors that name the path."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rlquant.errors import InputError
from rlquant.measure import (
    Agreement,
    Latency,
    Measurement,
    QGap,
    Retention,
    Score,
    Size,
    compare,
    plain,
    results_document,
    validate_results,
    weight_histogram,
)

WEIGHTS = np.random.default_rng(0).normal(size=(8, 4))


def measurement(scores=(1.0, 2.0, 4.0)):
    return Measurement(
        precision="w8a8",
        method="rtn",
        runtime="torch",
        score=Score.from_episodes(scores),
        retention=compare(np.add(scores, 1), scores, random_score=-20.0),
        bytes=Size(weights=np.int64(1234), artifact=2000),
        compression=np.float32(3.5),
        agreement=Agreement(0.99, 0.25, QGap(0.1, 0.2, 0.3, 0.05)),
        latency=Latency(1.0, 2.0, 3.0, 4.0, 5.0, 2000, True),
        weights=(weight_histogram("actor.0", WEIGHTS, WEIGHTS.round(), sqnr_db=math.inf, bins=5),),
    )


def document(**changes):
    parts = {
        "subject": {
            "source": "a.zip",
            "kind": "control",
            "algorithm": "PPO",
            "env": "CartPole-v1",
            "parameters": 9,
        },
        "settings": {"episodes": 3, "seed": 0, "margin": 0.02, "confidence": 0.95},
        "machine": {"cpu": "any"},
        "versions": {"rlquant": "0.1.0"},
        "reference": {"precision": "fp32", "random_score": -20.0},
        "rows": [measurement().to_row()],
    }
    return results_document(**(parts | changes))


def test_a_row_has_the_keys_of_the_contract():
    row = measurement().to_row()
    assert {key: set(row[key]) for key in ("score", "retention", "agreement", "bytes", "latency_us")} == {
        "score": {"mean", "std", "iqm", "worst_decile", "ci", "episodes"},
        "retention": {"value", "ci", "verdict", "more_episodes", "reason"},
        "agreement": {"action", "max_abs", "q_gap"},
        "bytes": {"weights", "artifact"},
        "latency_us": {"p50", "p90", "p99", "p999", "max", "calls", "simulated"},
    }
    assert set(row) >= {"precision", "method", "runtime", "compression", "weights"}
    assert set(row["weights"][0]) == {"layer", "edges", "before", "after", "sqnr_db"}
    assert row["score"]["episodes"] == [1.0, 2.0, 4.0]


def test_a_document_survives_strict_json():
    made = document()
    assert validate_results(json.loads(json.dumps(made, allow_nan=False))) == made
    assert made["rows"][0]["weights"][0]["sqnr_db"] is None  # infinite
    assert made["rows"][0]["bytes"]["weights"] == 1234


def test_one_episode_and_unmeasured_parts_are_null():
    row = replace(measurement((3.0,)), agreement=None, latency=None, bytes=Size(10), weights=()).to_row()
    assert row["score"]["std"] is None
    assert row["score"]["ci"] == row["retention"]["ci"] == [None, None]
    assert row["agreement"] is row["latency_us"] is row["bytes"]["artifact"] is None
    document(rows=[row])


def test_a_reference_row_is_valid():
    document(rows=[replace(measurement(), retention=Retention.of_reference()).to_row()])


def test_scores_of_language_subjects_are_negative_losses_and_valid():
    document(subject={"source": "model", "kind": "language"}, rows=[measurement((-3.1, -2.9, -3.0)).to_row()])


def test_plain_converts_numpy_and_refuses_objects():
    assert plain({"a": (np.float64("nan"), np.bool_(True), np.arange(2))}) == {"a": [None, True, [0, 1]]}
    with pytest.raises(InputError, match="object"):
        plain({"a": object()})


def test_histograms_count_every_weight_in_common_bins():
    made = weight_histogram("w", WEIGHTS, WEIGHTS * 1.5, sqnr_db=6.0, bins=61)
    assert sum(made.before) == sum(made.after) == WEIGHTS.size
    assert len(made.edges) == 62
    assert made.edges[0] == -made.edges[-1] == pytest.approx(-1.5 * np.abs(WEIGHTS).max())
    assert made.edges[30] < 0 < made.edges[31]


@pytest.mark.parametrize("bad", [np.full((2, 2), np.nan), np.empty(0)])
def test_histograms_refuse_bad_weights(bad):
    with pytest.raises(InputError, match="weights of w"):
        weight_histogram("w", bad, bad, sqnr_db=0.0)


def test_histogram_of_zeros_has_bins():
    assert sum(weight_histogram("w", np.zeros(3), np.zeros(3), sqnr_db=math.inf).after) == 3


def change(path, value):
    def apply(made):
        *parents, last = path
        for key in parents:
            made = made[key]
        if value is KeyError:
            del made[last]
        else:
            made[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["rows", 0, "score", "ci"], [1.0], r"rows\[0\]\.score\.ci must have exactly 2"),
        (["rows", 0, "score", "ci", 0], "low", r"rows\[0\]\.score\.ci\[0\] must be a finite number"),
        (["rows", 0, "score", "episodes"], [], r"rows\[0\]\.score\.episodes must have at least 1"),
        (["rows", 0, "score", "mean"], math.nan, r"rows\[0\]\.score\.mean must be a finite number, not nan"),
        (["rows", 0, "retention", "verdict"], "fine", "one of retained, lost, undecided, not 'fine'"),
        (["rows", 0, "retention", "more_episodes"], -1, "whole number"),
        (["rows", 0, "latency_us", "simulated"], 1, "simulated must be true or false"),
        (["rows", 0, "precision"], KeyError, r"rows\[0\]\.precision is missing"),
        (["rows", 0, "bytes", "weights"], True, "whole number"),
        (["rows"], {}, "rows must be a list"),
        (["subject", "kind"], "vision", "subject.kind must be one of control, language"),
        (["subject"], None, "subject must be an object"),
        (["settings", "margin"], KeyError, "settings.margin is missing"),
        (["schema"], "rlquant.results/9", "version that wrote it"),
        (["schema"], KeyError, "not a results document"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(path, value, message):
    made = copy.deepcopy(document())
    change(path, value)(made)
    with pytest.raises(InputError, match=message):
        validate_results(made)


@pytest.mark.parametrize("other", [None, [], "text", {}])
def test_other_json_is_no_results_document(other):
    with pytest.raises(InputError, match="not a results document"):
        validate_results(other)
