"""Training data: local files and Hub datasets, columns by name, bad rows counted, prompts kept apart for the end.

A row is a preference pair, a conversation or text to imitate, or a prompt with whatever its reward needs. Rows of one
prompt are held out together: a model is never asked what it was trained on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from rlquant.config import Section
from rlquant.errors import InputError, missing_package
from rlquant.llm.data import Pair, as_messages, as_pair, read_rows
from rlquant.sources import is_hub_id

__all__ = ["DataSettings", "Examples", "Kind", "read_examples", "require_data"]

Kind = Literal["pairs", "texts", "prompts"]
_NEEDED = {
    "pairs": "prompt, chosen and rejected (or the latter two with a common beginning)",
    "texts": "messages, or prompt and completion, or text",
    "prompts": "prompt",
}
_SHOWN = 3


class DataSettings(Section):
    """What is learned from."""

    shorthand: ClassVar[str | None] = "path"
    path: str = Field(description="a .jsonl, .json, .csv or .parquet file, or a dataset's Hub id")
    split: str = Field("train", description="of a Hub dataset")
    columns: dict[str, str] = Field({}, description="our name of a column: its name in the data")
    chat: bool = Field(False, description="write text as turns of the model's chat template")
    held_out: float = Field(
        0.1, ge=0, lt=1, description="share of the prompts that are kept for the evaluation"
    )
    limit: int | None = Field(None, ge=2, description="read the first so many rows")
    max_length: int = Field(1024, ge=8, description="tokens of prompt and answer together")
    max_prompt: int = Field(512, ge=4, description="tokens of the prompt")
    too_long: Literal["drop", "fail"] = Field("drop", description="what becomes of longer rows")
    bad_rows: Literal["skip", "fail"] = Field("fail", description="what becomes of rows that lack something")
    seed: int = Field(0, description="of the choice of what is held out")


@dataclass
class Examples:
    """Rows to learn from, and rows held out.

    Attributes:
        train, held_out: rows with the keys of their kind: ``prompt``, ``chosen`` and ``rejected``; ``prompt`` and
            ``completion``, or ``text``; or ``prompt`` and all other columns.
        left_out: how many rows were left out, by reason.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    left_out: dict[str, int] = field(default_factory=dict)


def read_examples(settings: DataSettings, kind: Kind, length: Callable[[Any], int]) -> Examples:
    """Read, check and divide the data.

    Args:
        settings: which data, and what becomes of rows that cannot be used.
        kind: what its rows are.
        length: how many tokens a text or a conversation has.

    Raises:
        InputError: the data cannot be read or lacks a column, a row is bad and ``bad_rows`` is ``fail``, or fewer than
            two prompts are left. The message shows the first bad rows.
    """
    rows, bad = [], _Bad(settings)
    for number, given in enumerate(_rows(settings), 1):
        row = _renamed(given, settings.columns)
        if number == 1:
            _check_columns(row, kind, settings)
        reason, found = _understood(row, kind, settings)
        if not reason:
            reason = _too_long(found, kind, settings, length)
        if reason:
            bad.note(number, reason, given)
        else:
            rows.append(found)
    bad.tell(number)
    train, held_out = _divide(rows, settings)
    return Examples(train, held_out, bad.counts)


def require_data(settings: DataSettings) -> None:
    """Say that a file is missing before a model is loaded. Raises InputError."""
    path = Path(settings.path).expanduser()
    if _is_file(path, settings) and not path.is_file():
        raise InputError(
            f"data.path = {settings.path!r}: there is no such file, and it is no dataset's Hub id"
        )


class _Bad:
    """Rows that are left out: counted, and the first of them shown."""

    def __init__(self, settings: DataSettings) -> None:
        self.settings = settings
        self.counts: dict[str, int] = {}
        self.shown: list[str] = []

    def note(self, number: int, reason: str, row: Mapping[str, Any]) -> None:
        """Count a row; raises InputError where bad rows are fatal."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        text = json.dumps(row, default=str)
        shown = f"row {number} {reason}: {text[:200]}{'...' if len(text) > 200 else ''}"
        choice = "too_long" if reason == _LONG else "bad_rows"
        if getattr(self.settings, choice) == "fail":
            way_out = "drop" if choice == "too_long" else "skip"
            raise InputError(f"{self.settings.path}, {shown}; data.{choice}={way_out} leaves such rows out")
        if len(self.shown) < _SHOWN:
            self.shown.append(shown)

    def tell(self, total: int) -> None:
        """A line on standard error for each reason, and the first rows."""
        for reason, count in self.counts.items():
            sys.stderr.write(f"rlquant: {count} of {total} rows {reason}: left out\n")
        for line in self.shown:
            sys.stderr.write(f"  {line}\n")


_LONG = "is longer than data.max_length or data.max_prompt"


def _rows(settings: DataSettings) -> list[dict[str, Any]]:
    path = Path(settings.path).expanduser()
    rows = read_rows(path)[: settings.limit] if _is_file(path, settings) else _from_hub(settings)
    if not rows:
        raise InputError(f"{settings.path} holds no row")
    return rows


def _is_file(path: Path, settings: DataSettings) -> bool:
    return path.exists() or bool(path.suffix) or not is_hub_id(settings.path)


def _from_hub(settings: DataSettings) -> list[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise missing_package("datasets", "llm", f"the dataset {settings.path}") from None
    try:
        data = datasets.load_dataset(settings.path, split=settings.split)
    except Exception as error:  # of the Hub's client, whichever that is
        first = str(error).strip().split("\n")[0]
        raise InputError(f"{settings.path} is no file, and no dataset that can be fetched: {first}") from None
    return [dict(row) for row in data.take(settings.limit or len(data))]


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row under our names of its columns."""
    found = dict(row)
    for ours, theirs in columns.items():
        if theirs in row:
            found[ours] = row[theirs]
    return found


def _check_columns(row: Mapping[str, Any], kind: Kind, settings: DataSettings) -> None:
    """Raises InputError where the data lacks what its kind needs; the first row stands for all."""
    missing = [theirs for theirs in settings.columns.values() if theirs not in row]
    sets = {
        "pairs": [{"chosen", "rejected"}],
        "texts": [{"messages"}, {"prompt", "completion"}, {"text"}],
        "prompts": [{"prompt"}],
    }[kind]
    if missing or not any(wanted <= set(row) for wanted in sets):
        raise InputError(
            f"{settings.path} has the columns {', '.join(sorted(row))}; needed are {_NEEDED[kind]}: name them, as in "
            "data.columns='{prompt: question}'" + (f" ({missing[0]!r} is not there)" if missing else "")
        )


def _understood(row: dict[str, Any], kind: Kind, settings: DataSettings) -> tuple[str, dict[str, Any]]:
    """Why a row cannot be used, or an empty text; and the row in the form of its kind."""
    if kind == "pairs":
        return _pair(row, settings)
    if kind == "prompts":
        prompt = row.get("prompt")
        if not prompt or not isinstance(prompt, str | list):
            return "has no prompt", {}
        return "", {**row, "prompt": as_messages(prompt, "user") if settings.chat else prompt}
    return _imitated(row, settings)


def _pair(row: dict[str, Any], settings: DataSettings) -> tuple[str, dict[str, Any]]:
    if not row.get("chosen") or not row.get("rejected"):
        return "has an empty answer", {}
    if row["chosen"] == row["rejected"]:
        return "has the same answer as chosen and rejected", {}
    try:
        pair: Pair = as_pair(row, "it")
    except InputError as error:
        return f"is no pair ({str(error).removeprefix('it ').removeprefix('it: ')})", {}
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if not prompt:
        return "has no prompt", {}
    if settings.chat:
        prompt = as_messages(prompt, "user")
        chosen, rejected = (as_messages(answer, "assistant") for answer in (chosen, rejected))
    return "", {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _imitated(row: dict[str, Any], settings: DataSettings) -> tuple[str, dict[str, Any]]:
    messages = row.get("messages")
    if messages is not None:
        answered = (
            isinstance(messages, list) and len(messages) > 1 and messages[-1].get("role") == "assistant"
        )
        if not answered or not messages[-1].get("content"):
            return "does not end with an answer of the assistant", {}
        return "", {"prompt": messages[:-1], "completion": messages[-1:]}
    if "prompt" in row and "completion" in row:
        if not row["prompt"] or not row["completion"]:
            return "has an empty prompt or completion", {}
        prompt, completion = row["prompt"], row["completion"]
        if settings.chat:
            prompt, completion = as_messages(prompt, "user"), as_messages(completion, "assistant")
        return "", {"prompt": prompt, "completion": completion}
    if not row.get("text") or not isinstance(row["text"], str):
        return "has no text", {}
    return "", {"text": row["text"]}


def _too_long(
    row: Mapping[str, Any], kind: Kind, settings: DataSettings, length: Callable[[Any], int]
) -> str:
    if "text" in row and kind == "texts":
        return _LONG if length(row["text"]) > settings.max_length else ""
    prompt = length(row["prompt"])
    answers = [
        length(row[key]) for key in ("chosen", "rejected", "completion") if key in row and kind != "prompts"
    ]
    longest = prompt + max(answers, default=0)
    return _LONG if prompt > settings.max_prompt or longest > settings.max_length else ""


def _divide(
    rows: list[dict[str, Any]], settings: DataSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to learn from and rows held out, those of one prompt together, in the order of the data."""
    keys = [json.dumps(row.get("prompt", row.get("text")), sort_keys=True) for row in rows]
    prompts = list(dict.fromkeys(keys))
    if len(prompts) < 2:
        raise InputError(
            f"{settings.path} has {len(prompts)} prompts that can be used; at least 2 are needed"
        )
    count = (
        0
        if settings.held_out == 0
        else min(max(1, round(settings.held_out * len(prompts))), len(prompts) - 1)
    )
    chosen = np.random.default_rng(settings.seed).permutation(len(prompts))[:count]
    kept = {prompts[index] for index in chosen}
    pairs = list(zip(keys, rows, strict=True))
    return [row for key, row in pairs if key not in kept], [row for key, row in pairs if key in kept]
