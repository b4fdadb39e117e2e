"""Texts, chats and preference pairs from local files.

A row's kind is read off its keys: ``prompt`` with ``chosen`` and ``rejected`` (or the latter alone, as the dialogues of
hh-rlhf are), ``messages``, or ``text``. A JSONL file may be compressed with gzip; Parquet and CSV need the package
datasets.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from rlquant.errors import InputError, missing_package

__all__ = [
    "Messages",
    "Pair",
    "as_messages",
    "as_pair",
    "as_text",
    "prompt_text",
    "read_pairs",
    "read_rows",
    "read_text",
    "read_texts",
]

Messages = list[dict[str, str]]
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_KINDS = "prompt/chosen/rejected, chosen/rejected, messages, or text"


@dataclass(frozen=True)
class Pair:
    """A prompt and two ways to go on, of which people (or a check) prefer one; text, or chat messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL (also ``.gz``), JSON, CSV or Parquet file.

    Raises:
        InputError: it cannot be read, or a row is no object; the message names the line.
    """
    file = Path(path)
    name = file.name.removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return list(_json_lines(file))
    if name.endswith(".json"):
        content = _json(_content(file), str(file))
        rows = content if isinstance(content, list) else [content]
    elif name.endswith((".csv", ".parquet")):
        rows = _by_datasets(file)
    else:
        raise InputError(f"{path} is no .jsonl, .json, .csv or .parquet file")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no list of objects")
    return rows


def read_pairs(path: str | Path, limit: int | None = None) -> list[Pair]:
    """Preference pairs, the first ``limit``.

    Raises:
        InputError: the file cannot be read, or a row is no pair; the message says which.
    """
    rows = read_rows(path)[:limit]
    return [as_pair(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]


def read_texts(path: str | Path) -> list[str | Messages]:
    """What a model is shown for calibration: a text file as one text; of rows their text, their messages, or a
    pair's prompt with the chosen answer.

    Raises:
        InputError: the file cannot be read, or a row has none of these keys.
    """
    if Path(path).name.removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet")):
        rows = read_rows(path)
        return [_shown(row, f"{path}, row {number}") for number, row in enumerate(rows, 1)]
    return [read_text(path)]


def read_text(path: str | Path) -> str:
    """A text file, which may be compressed with gzip. Raises InputError where it cannot be read or is no text."""
    try:
        return TextIOWrapper(BytesIO(_content(Path(path))), encoding="utf-8").read()
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8, and no .jsonl, .json, .csv or .parquet file") from None


def as_text(shown: str | Messages, tokenizer: Any) -> str:
    """A text as it is, a chat by the tokenizer's template."""
    if isinstance(shown, str):
        return shown
    if getattr(tokenizer, "chat_template", None) is None:
        return "".join(f"{message['role']}: {message['content']}\n" for message in shown)
    text: str = tokenizer.apply_chat_template(shown, tokenize=False)
    return text


def prompt_text(prompt: str | Messages, tokenizer: Any) -> str:
    """A prompt as a model reads it: text as it is, a chat by the tokenizer's template, with the answer to come."""
    if isinstance(prompt, str):
        return prompt
    if getattr(tokenizer, "chat_template", None) is None:
        return as_text(prompt, tokenizer) + "assistant: "
    text: str = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return text


def as_pair(row: dict[str, Any], where: str) -> Pair:
    """A row as a preference pair. Raises InputError that begins with ``where``."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not chosen or not rejected or type(chosen) is not type(rejected):
        raise InputError(
            f"{where} is no preference pair: it needs chosen and rejected, both text or both messages"
        )
    if "prompt" in row:
        return Pair(row["prompt"], chosen, rejected)
    if isinstance(chosen, str):
        chosen, rejected = (_dialogue(text, where) for text in (chosen, rejected))
    most = min(len(chosen), len(rejected)) - 1
    shared = next((at for at in range(most) if chosen[at] != rejected[at]), most)
    if shared < 1:
        raise InputError(
            f"{where}: chosen and rejected have no beginning in common, so there is no prompt; add one"
        )
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:])


def _dialogue(text: str, where: str) -> Messages:
    """Turns of ``\\n\\nHuman: ... \\n\\nAssistant: ...``."""
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise InputError(f"{where} is no dialogue of Human: and Assistant:, and has no prompt")
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": _ROLES[who], "content": said.strip()} for who, said in turns]


def _shown(row: dict[str, Any], where: str) -> str | Messages:
    if "chosen" in row and "rejected" in row:
        pair = as_pair(row, where)
        if isinstance(pair.prompt, str) and isinstance(pair.chosen, str):
            return pair.prompt + pair.chosen
        prompt, chosen = (
            as_messages(part, role) for part, role in ((pair.prompt, "user"), (pair.chosen, "assistant"))
        )
        return prompt + chosen
    if "messages" in row:
        return list(row["messages"])
    if isinstance(row.get("text"), str):
        return str(row["text"])
    raise InputError(f"{where} has the keys {', '.join(sorted(row))}; it needs {_KINDS}")


def as_messages(part: str | Messages, role: str) -> Messages:
    """A text as the turn of a role; turns stay as they are."""
    return [{"role": role, "content": part}] if isinstance(part, str) else part


def _content(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not JSON") from None


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_content(file).splitlines(), 1):
        if line.strip():
            row = _json(line, f"{file}, line {number}")
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number} is no object")
            yield row


def _by_datasets(file: Path) -> list[dict[str, Any]]:
    try:
        from datasets import Dataset
    except ImportError:
        raise missing_package("datasets", "llm", f"{file.suffix} files") from None
    read = Dataset.from_csv if file.suffix == ".csv" else Dataset.from_parquet
    try:
        return list(read(str(file)))
    except Exception as error:
        raise InputError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
