"""Training data: understood, counted where it is bad, and divided by prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlquant.errors import InputError
from rlquant.llm.examples import DataSettings, read_examples


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(shown: Any) -> int:
    """A length that any text and any conversation has."""
    return (
        len(shown.split()) if isinstance(shown, str) else sum(len(turn["content"].split()) for turn in shown)
    )


def pairs(count: int, each: int = 2) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {i}", "chosen": f"good {i} {j}", "rejected": f"bad {i} {j}"}
        for i in range(count)
        for j in range(each)
    ]


def test_rows_of_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    path = written(tmp_path, pairs(20, 3))
    found = read_examples(DataSettings(path=path, held_out=0.25), "pairs", words)
    assert len(found.train) == 45
    assert len(found.held_out) == 15
    assert not {row["prompt"] for row in found.train} & {row["prompt"] for row in found.held_out}
    again = read_examples(DataSettings(path=path, held_out=0.25), "pairs", words)
    assert again == found
    other = read_examples(DataSettings(path=path, held_out=0.25, seed=1), "pairs", words)
    assert other.held_out != found.held_out


def test_bad_rows_are_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        *pairs(4, 1),
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "q", "chosen": "long " * 50, "rejected": "b"},
    ]
    path = written(tmp_path, rows)
    settings = DataSettings(path=path, bad_rows="skip", max_length=20, max_prompt=10)
    found = read_examples(settings, "pairs", words)
    assert len(found.train) + len(found.held_out) == 4
    assert sum(found.left_out.values()) == 4
    said = capsys.readouterr().err
    assert "1 of 8 rows has the same answer as chosen and rejected: left out" in said
    assert "row 5" in said
    for change, message in (
        ({"bad_rows": "fail"}, "row 5 has the same answer"),
        ({"too_long": "fail"}, "row 8 is longer"),
    ):
        with pytest.raises(InputError, match=message):
            read_examples(settings.model_copy(update=change), "pairs", words)


def test_columns_are_renamed(tmp_path: Path) -> None:
    path = written(tmp_path, [{"question": f"q{i}", "good": "a", "bad": "b"} for i in range(4)])
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    found = read_examples(DataSettings(path=path, columns=columns), "pairs", words)
    assert found.train[0] == {"prompt": "q0", "chosen": "a", "rejected": "b"}
    with pytest.raises(InputError, match=r"has the columns bad, good, question; needed are prompt, chosen"):
        read_examples(DataSettings(path=path), "pairs", words)
    with pytest.raises(InputError, match="'nothing' is not there"):
        read_examples(DataSettings(path=path, columns={**columns, "prompt": "nothing"}), "pairs", words)


def test_text_becomes_turns_of_a_chat(tmp_path: Path) -> None:
    found = read_examples(DataSettings(path=written(tmp_path, pairs(3, 1)), chat=True), "pairs", words)
    assert found.train[0]["prompt"] == [{"role": "user", "content": "question 0"}]
    assert found.train[0]["rejected"] == [{"role": "assistant", "content": "bad 0 0"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "some text"}, {"text": "some text"}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
        ),
    ],
)
def test_what_is_imitated(row: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    other = {
        key: value + "!" if isinstance(value, str) else [{"role": "user", "content": "x"}, *value]
        for key, value in row.items()
    }
    found = read_examples(DataSettings(path=written(tmp_path, [row, other]), held_out=0), "texts", words)
    assert found.train[0] == expected
    assert len(found.train) == 2


def test_prompts_keep_their_other_columns(tmp_path: Path) -> None:
    rows = [{"question": f"1 + {i}", "answer": str(1 + i)} for i in range(3)]
    settings = DataSettings(path=written(tmp_path, rows), columns={"prompt": "question"}, held_out=0)
    assert read_examples(settings, "prompts", words).train[2] == {
        "question": "1 + 2",
        "prompt": "1 + 2",
        "answer": "3",
    }


def test_dialogues_of_hh_rlhf(tmp_path: Path) -> None:
    start = "\n\nHuman: hello {}\n\nAssistant: "
    rows = [{"chosen": start.format(i) + "hi", "rejected": start.format(i) + "no"} for i in range(2)]
    found = read_examples(DataSettings(path=written(tmp_path, rows), held_out=0), "pairs", words)
    assert found.train[1]["prompt"] == [{"role": "user", "content": "hello 1"}]
    assert found.train[1]["chosen"] == [{"role": "assistant", "content": "hi"}]


def test_too_few_prompts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 prompts that can be used"):
        read_examples(DataSettings(path=written(tmp_path, pairs(1, 4))), "pairs", words)
