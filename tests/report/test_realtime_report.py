"""Real time in the terminal and in the HTML report."""

import io
import json
import re

import pytest
import sample_documents as samples
from rich.console import Console

from rlquant.errors import InputError
from rlquant.measure import Score, compare, plain, validate_results
from rlquant.report import realtime_sentences, realtime_table, render_report
from rlquant.report.realtime import time_text


def in_real_time(kept, *, simulated=False):
    """The CartPole document with real-time entries: ``kept`` has shares of the score by row and slowdown."""
    document = samples.cartpole()
    reference = document["rows"][0]["score"]["episodes"]
    for row in document["rows"]:
        row["realtime"] = []
        for slowdown, share in kept.get(row["precision"], {}).items():
            scores = [share * score for score in reference]
            latency = dict.fromkeys(("p50", "p90", "p99", "p999", "max"), 0.4 * slowdown)
            entry = {
                "slowdown": slowdown,
                "latency_us": latency | {"calls": 2000, "simulated": simulated},
                "control_rate_hz": 50.0,
                "actions_hz": 40.0,
                "missed": 0.2,
                "late": 0.25,
                "delay_periods": 1.25,
                "score": plain(Score.from_episodes(scores)),
                "retention": plain(compare(reference, scores, random_score=22.3)),
            }
            row["realtime"].append(entry)
    return validate_results(json.loads(json.dumps(document)))


KEPT = {"fp32": {1: 1.0, 200: 1.0, 5000: 0.4}, "w8a8": {200: 1.0, 5000: 1.0, 1: 1.0}, "w4a8": {1: 0.5}}


def shown(document):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(realtime_table(document))
    return console.export_text()


def test_a_sentence_says_how_slow_the_chip_may_be():
    assert realtime_sentences(in_real_time(KEPT)) == [
        "fp32 keeps the reward in real time up to 200x (80 µs an action); at 5,000x (2 ms an action) it keeps 37.2%.",
        "w8a8 keeps the reward in real time up to 5,000x (2 ms an action).",
        "w4a8 keeps 47.7% of the reward in real time even at 1x (0.4 µs an action).",
    ]


def test_a_sentence_does_not_hide_that_nothing_is_decided():
    document = in_real_time({"fp32": {1: 1.0, 50: 1.0, 200: 0.1}})
    retention = document["rows"][0]["realtime"][1]["retention"]
    retention["verdict"] = "undecided"
    about = "fp32 keeps about 100% of the reward in real time at 50x (20 µs an action), undecided"
    assert realtime_sentences(document) == [f"{about}; at 200x (80 µs an action) it keeps 5.8%."]
    del document["rows"][0]["realtime"][2]
    assert realtime_sentences(document) == [f"{about}."]
    retention["value"] = None
    assert realtime_sentences(document) == [
        "fp32 cannot be judged in real time at 50x (20 µs an action), undecided."
    ]


def test_the_table_fits_a_terminal():
    text = shown(in_real_time(KEPT))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"fp32 +5,000x +2 ms +40\.0 +1\.25 +200\.0 +37\.2% +LOST", text)
    assert "50.0 steps a second" in text
    assert "simulated" not in text
    assert "~2 ms" in shown(in_real_time(KEPT, simulated=True))


def test_without_real_time_nothing_is_said_of_it():
    document = samples.cartpole()
    assert realtime_table(document) is None
    assert realtime_sentences(document) == []
    assert "In real time" not in render_report(document)


def test_the_page_has_the_table_and_figures_true_to_the_document():
    page = render_report(in_real_time(KEPT))
    assert "w8a8 keeps the reward in real time up to 5,000x" in page
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    figures = json.loads(data)
    lines = {line["name"]: line for line in figures["slowdown"]["data"]}
    assert set(lines) == {"fp32", "w8a8", "w4a8"}
    assert lines["fp32"]["x"] == [1, 200, 5000]
    assert lines["fp32"]["y"] == [500, 500, 200]
    assert lines["w8a8"]["x"] == [1, 200, 5000]
    assert lines["fp32"]["marker"]["symbol"] == ["circle", "circle", "x"]
    times = {line["name"]: line["x"] for line in figures["action_time"]["data"]}
    assert times["fp32"] == pytest.approx([0.0004, 0.08, 2.0])
    for name in ("slowdown", "action_time"):
        assert f'id="figure-{name}"' in page


def test_names_in_the_document_stay_text():
    document = in_real_time({"fp32": {1: 1.0}})
    document["rows"][0]["precision"] = document["reference"]["precision"] = "<img src=x>"
    page = render_report(document)
    assert "<img" not in page.split("<script")[0]
    (data,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert json.loads(data)["slowdown"]["data"][0]["name"] == "&lt;img src=x&gt;"


def test_a_damaged_entry_is_named():
    document = in_real_time(KEPT)
    document["rows"][0]["realtime"][1]["late"] = "often"
    with pytest.raises(InputError, match=r"rows\[0\]\.realtime\[1\]\.late must be a finite number"):
        validate_results(document)


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0.391, "0.391 µs"),
        (999.4, "999 µs"),
        (999.6, "1 ms"),
        (15_400, "15.4 ms"),
        (2e6, "2 s"),
        (3.6e9, "3,600 s"),
    ],
)
def test_durations_have_the_unit_that_suits_them(microseconds, text):
    assert time_text(microseconds) == text
