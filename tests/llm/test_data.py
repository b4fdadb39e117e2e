"""Texts, chats and pairs from files, and what is wrong with some."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlquant.errors import InputError
from rlquant.llm.calibration import calibration_windows, windows_of
from rlquant.llm.data import read_pairs, read_texts
from rlquant.llm.model import LanguageModel
from rlquant.llm.preferences import preference_accuracy

HH = {
    "chosen": "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: 2 and 3?\n\nAssistant: They make 5.",
    "rejected": "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: 2 and 3?\n\nAssistant: They make 9.",
}
PLAIN = {"prompt": "12 and 7 ", "chosen": "make 19. ", "rejected": "ekam 91 ."}


def lines(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def reference() -> LanguageModel:
    return LanguageModel(tiny.model(), tiny.tokenizer(), "tiny", "fp32")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_dialogues_are_split_where_they_part(name: str, tmp_path: Path) -> None:
    (pair,) = read_pairs(lines(tmp_path / name, HH))
    assert [turn["role"] for turn in pair.prompt] == ["user", "assistant", "user"]
    assert pair.chosen == [{"role": "assistant", "content": "They make 5."}]
    assert pair.rejected == [{"role": "assistant", "content": "They make 9."}]


def test_every_kind_of_row_can_calibrate(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "2 and 2?"}, {"role": "assistant", "content": "4"}]}
    shown = read_texts(lines(tmp_path / "a.jsonl", {"text": "plain"}, chat, HH, PLAIN))
    assert shown[0] == "plain"
    assert shown[3] == "12 and 7 make 19. "
    windows = calibration_windows(reference(), tmp_path / "a.jsonl", windows=3, length=20)
    text = tiny.tokenizer().decode(windows.reshape(-1))
    assert windows.shape == (3, 20)
    assert windows.dtype == torch.int64
    assert "<|assistant|>" in tiny.tokenizer().decode(
        calibration_windows(reference(), tmp_path / "a.jsonl", windows=99, length=8).reshape(-1)
    )
    assert text


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables(suffix: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([PLAIN, PLAIN])
    path = tmp_path / f"a.{suffix}"
    table.to_csv(path) if suffix == "csv" else table.to_parquet(path)
    assert [pair.chosen for pair in read_pairs(path)] == ["make 19. "] * 2


def test_windows_do_not_overlap_and_follow_the_seed() -> None:
    texts = [list(range(100)), list(range(100, 200))]
    one = windows_of(texts, windows=9, length=10, seed=1)
    assert len(set(one.reshape(-1).tolist())) == 90
    assert torch.equal(one, windows_of(texts, windows=9, length=10, seed=1))
    assert not torch.equal(one, windows_of(texts, windows=9, length=10, seed=2))
    with pytest.raises(InputError, match="has 200 tokens, fewer than one calibration window of 201"):
        windows_of(texts, windows=1, length=201, seed=0)


def test_a_model_prefers_what_it_has_learnt() -> None:
    lm = reference()
    text = [(a, b) for a in range(10, 60, 7) for b in range(10, 60, 9)]
    rows = [
        {"prompt": f"{a} and {b} ", "chosen": f"make {a + b}. ", "rejected": "ekam 9 x9."} for a, b in text
    ]
    from rlquant.llm.data import Pair

    pairs = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    found = preference_accuracy(lm, pairs)
    assert found.summed > 0.95
    assert found.pairs == len(rows)
    assert found.cut == 0
    swapped = preference_accuracy(lm, [Pair(p.prompt, p.rejected, p.chosen) for p in pairs])
    assert swapped.summed == pytest.approx(1 - found.summed)
    assert preference_accuracy(lm, pairs, longest=14).cut == len(pairs)


def test_the_likelihood_of_an_answer_is_transformers() -> None:
    from rlquant.llm.preferences import answer_log_probability

    lm = reference()
    prompt, answer = lm.tokens("12 and 7 "), lm.tokens("make 19. ")
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    expected = -float(lm.model(ids, labels=labels).loss) * len(answer)
    assert answer_log_probability(lm, prompt, answer, 512) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"chosen": "x"}\n', "row 1 is no preference pair"),
        ("a.jsonl", '{"chosen": "x", "rejected": "y"}\n', "row 1 is no dialogue"),
        ("a.jsonl", "{}\nnot json\n", "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is no object"),
        ("a.json", "3", "holds no list of objects"),
        ("a.xml", "<a/>", r"is no \.jsonl"),
    ],
)
def test_bad_rows_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "missing.jsonl")
