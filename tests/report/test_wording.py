"""Verdicts in plain words: a loss is called a loss, and no rounding hides one."""

import pytest
import sample_documents as samples
from hypothesis import given
from hypothesis import strategies as st

from rlquant.report.wording import UNDEFINED, bytes_text, findings, number_text, percent_text, row_labels


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (1.0, "100%"),
        (0.99999, "99.99%"),
        (0.9996, "99.96%"),
        (1.0004, "100.0%"),
        (0.926, "92.6%"),
        (0.0, "0.0%"),
        (0.0004, "0.04%"),
        (-0.015, "-1.5%"),
        (1.159, "115.9%"),
    ],
)
def test_percent(share, text):
    assert percent_text(share) == text


@given(st.floats(0, 1, exclude_max=True))
def test_less_than_all_is_never_shown_as_all(share):
    assert float(percent_text(share).rstrip("%")) < 100


@given(st.floats(1e-9, 1))
def test_more_than_nothing_is_never_shown_as_nothing(share):
    assert float(percent_text(share).rstrip("%")) > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, UNDEFINED), (0, "0.00"), (-164.53, "-164.5"), (12345.6, "12,346"), (0.0123, "0.0123")],
)
def test_number(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, UNDEFINED), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB")],
)
def test_bytes(count, text):
    assert bytes_text(count) == text


def test_labels_name_only_what_differs():
    def row(precision, method="rtn", runtime="torch"):
        return {"precision": precision, "method": method, "runtime": runtime}

    assert row_labels([row("fp32", "none"), row("int8"), row("w8a8")]) == ["fp32", "int8", "w8a8"]
    assert row_labels([row("int8"), row("int8", "gptq"), row("int4")]) == ["int8 rtn", "int8 gptq", "int4"]
    assert row_labels([row("int8"), row("int8", runtime="onnx")]) == ["int8 torch", "int8 onnx"]
    assert row_labels([row("int8"), row("int8")]) == ["int8", "int8 #2"]


def test_losses_come_first_and_the_worst_on_top():
    found = findings(samples.negative_returns())
    assert [(f.label, f.verdict) for f in found] == [
        ("int2", "lost"),
        ("int4", "lost"),
        ("bf16", "retained"),
        ("int8", "retained"),
        ("w8a8", "retained"),
    ]


def test_a_loss_is_said_with_its_numbers():
    worst, loss, undecided = findings(samples.heavy_loss())
    assert worst.headline == "int4 LOSES ALL of the reward: no better than random"
    assert loss.headline == "int8 LOSES 92.6% of the reward"
    assert "Mean return 57.5 against 500.0 in fp32 (random: 22.3), over 20 episodes." in loss.detail
    assert undecided.headline == "bf16 is undecided: it keeps about 99.3% of the reward"
    assert undecided.detail.endswith("About 98 more episodes would decide.")


def test_a_ratio_on_the_line_is_not_promised_a_decision():
    document = samples.heavy_loss()
    document["rows"][1]["retention"]["more_episodes"] = 10_000
    assert "might not decide" in findings(document)[-1].detail


def test_a_reference_without_reward_judges_nothing():
    (finding,) = findings(samples.bad_reference())
    assert finding.headline == "int8 cannot be judged"
    assert "not clearly better than random" in finding.detail


def test_language_subjects_have_scores_and_windows():
    text = " ".join(f.headline + f.detail for f in findings(samples.language()))
    assert "of the score" in text
    assert "64 windows" in text
    assert not {"reward", "return", "episode"} & set(text.replace("s ", " ").split())


def test_rows_without_a_reference_row_are_still_described():
    document = samples.heavy_loss()
    del document["rows"][0]
    assert "against" not in findings(document)[0].detail
    assert len(findings(document)) == 3
