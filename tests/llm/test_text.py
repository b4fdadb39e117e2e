"""Windows, losses and distances against transformers' own loss and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr

from rlquant.errors import InputError
from rlquant.llm.model import LanguageModel
from rlquant.llm.text import Windows, compare_windows, window_losses


def reference() -> LanguageModel:
    return LanguageModel(tiny.model(), tiny.tokenizer(), "tiny", "fp32")


def test_losses_are_transformers() -> None:
    lm = reference()
    windows = Windows.of(lm.tokens(tiny.TEXT), 48, limit=6)
    expected = [lm.model(row[None], labels=row[None]).loss.item() for row in torch.from_numpy(windows.tokens)]
    np.testing.assert_allclose(window_losses(lm, windows), expected, rtol=1e-5)


def test_with_a_stride_only_new_tokens_count() -> None:
    lm = reference()
    windows = Windows.of(lm.tokens(tiny.TEXT), 48, 16, limit=6)
    labels = torch.from_numpy(windows.tokens).clone()
    labels[:, :32] = -100
    rows = zip(torch.from_numpy(windows.tokens), labels, strict=True)
    expected = [float(lm.model(row[None], labels=label[None]).loss) for row, label in rows]
    np.testing.assert_allclose(window_losses(lm, windows), expected, rtol=1e-5)


@given(st.integers(2, 40), st.integers(1, 40), st.integers(40, 200))
def test_windows_follow_the_text(length: int, stride: int, count: int) -> None:
    stride = min(stride, length)
    windows = Windows.of(list(range(count)), length, stride)
    starts = windows.tokens[:, 0]
    np.testing.assert_array_equal(windows.tokens, starts[:, None] + np.arange(length))
    assert (np.diff(starts) == stride).all()
    assert count - windows.tokens[-1, -1] - 1 < stride
    predicted = windows.tokens[:, -windows.scored :].ravel()
    assert len(set(predicted.tolist())) == len(predicted)  # no token is predicted twice


def test_distances_are_scipys() -> None:
    one, other = reference(), LanguageModel(tiny.model(steps=60), None, "other", "fp32")
    windows = Windows.of(one.tokens(tiny.TEXT), 32, limit=4)
    ids = torch.from_numpy(windows.tokens)
    with torch.no_grad():
        p, q = (
            log_softmax(each.model(ids).logits[:, :-1].double().numpy(), axis=-1) for each in (one, other)
        )
    found = compare_windows(one, other, windows)
    assert found.kl == pytest.approx(rel_entr(np.exp(p), np.exp(q)).sum(axis=-1).mean(), rel=1e-4)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    same = compare_windows(one, one, windows)
    assert same.kl == 0
    assert same.top1 == 1


def test_logits_in_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = reference()
    windows = Windows.of(lm.tokens(tiny.TEXT), 48, limit=2)
    whole = window_losses(lm, windows)
    monkeypatch.setattr("rlquant.llm.text._CHUNK_LOGITS", 5 * lm.vocabulary)
    np.testing.assert_allclose(window_losses(lm, windows), whole, rtol=1e-6)


@pytest.mark.parametrize(
    ("length", "stride", "message"),
    [(500, None, "fewer than one window of 500"), (1, None, "at least 2"), (8, 9, "stride up to that")],
)
def test_windows_that_cannot_be(length: int, stride: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Windows.of(list(range(100)), length, stride)


def test_numbers_that_are_none_are_named() -> None:
    broken = tiny.model(steps=1)
    broken.model.norm.weight.data.fill_(float("nan"))
    lm = LanguageModel(broken, tiny.tokenizer(), "broken", "fp32")
    with pytest.raises(InputError, match="broken in fp32 puts out NaN or infinity in window 0"):
        window_losses(lm, Windows.of(list(range(64)), 32))
