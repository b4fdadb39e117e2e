"""Settings of a recipe: a YAML file and overrides like ``train.lr=5e-6``, checked as a whole.

A recipe describes its settings as :class:`Section` classes. Every mistake is reported at once, with the nearest name
for a key that does not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from rlquant.errors import InputError, nearest

__all__ = ["Section", "checked", "parse_override", "read_yaml", "with_layer", "with_override"]


class Section(BaseModel):
    """Settings that belong together; give each field a type and a ``Field(description=...)``.

    ``shorthand`` names the field that a single value stands for: with ``path``, ``data=my.jsonl`` means
    ``data.path=my.jsonl``.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), coerce_numbers_to_str=True, allow_inf_nan=False
    )
    shorthand: ClassVar[str | None] = None


S = TypeVar("S", bound=Section)
Tree = dict[str, Any]


def read_yaml(path: Path) -> Tree:
    """A YAML file that holds a mapping. Raises InputError where it cannot be read or holds something else."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError(f"{path} holds no mapping of settings, such as 'train: {{lr: 5.0e-6}}'")
    return tree


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=c`` as its keys and its value, which is read as YAML. Raises InputError for anything else."""
    import yaml

    key, equals, value = text.partition("=")
    keys = key.split(".")
    if not equals or not all(part.isidentifier() for part in keys):
        raise InputError(
            f"{text!r} is no override: write KEY=VALUE or SECTION.KEY=VALUE, such as train.lr=5e-6"
        )
    try:
        return keys, yaml.safe_load(value)
    except yaml.YAMLError:
        return keys, value  # a text with a colon or a bracket in it


def with_layer(kind: type[Section], below: Mapping[str, Any], above: Mapping[str, Any]) -> Tree:
    """Settings ``above`` over those ``below``; sections are merged, everything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        section = _section(kind, key)
        if section is None or (value is None and _may_be_none(kind, key)):
            merged[key] = value
            continue
        old = merged.get(key)
        merged[key] = with_layer(section, *(_spelled_out(section, part) for part in (old, value)))
    return merged


def with_override(kind: type[Section], tree: Mapping[str, Any], text: str) -> Tree:
    """Settings with one override as :func:`parse_override` reads it."""
    keys, value = parse_override(text)
    for key in reversed(keys):
        value = {key: value}
    return with_layer(kind, tree, value)


def checked(kind: type[S], tree: Mapping[str, Any], where: str) -> S:
    """The settings as an object.

    Args:
        kind: what they are settings of.
        tree: what was given.
        where: their origin, for the message.

    Raises:
        InputError: a key is unknown or missing, or a value does not fit; the message lists every mistake.
    """
    try:
        return kind.model_validate(with_layer(kind, {}, tree))
    except ValidationError as error:
        known = list(_keys(kind))
        problems = list(dict.fromkeys(_problem(dict(each), known) for each in error.errors()))
    if len(problems) == 1:
        raise InputError(f"{where}: {problems[0]}")
    listed = "\n".join(f"  {problem}" for problem in problems)
    raise InputError(f"{where} has {len(problems)} mistakes:\n{listed}")


def _section(kind: type[Section], key: str) -> type[Section] | None:
    """The class of a section that a field holds, also where it may be None."""
    field = kind.model_fields.get(key)
    options = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((each for each in options if isinstance(each, type) and issubclass(each, Section)), None)


def _may_be_none(kind: type[Section], key: str) -> bool:
    return type(None) in get_args(kind.model_fields[key].annotation)


def _spelled_out(section: type[Section], value: Any) -> Any:
    if value is None:
        return {}
    if isinstance(value, Mapping) or section.shorthand is None:
        return value if isinstance(value, Mapping) else {"": value}
    return {section.shorthand: value}


def _keys(kind: type[Section], prefix: str = "") -> Iterator[str]:
    for key in kind.model_fields:
        yield prefix + key
        section = _section(kind, key)
        if section is not None:
            yield from _keys(section, f"{prefix}{key}.")


def _problem(error: dict[str, Any], known: Sequence[str]) -> str:
    parts = [str(part) for part in error["loc"]]
    if parts[-1] == "":  # a single value in place of a section
        inside = [key for key in known if key.startswith(f"{'.'.join(parts[:-1])}.")]
        return f"{'.'.join(parts[:-1])} = {error['input']!r} is a section: set {', '.join(inside)}"
    key = ".".join(parts)
    if error["type"] == "extra_forbidden":
        close = nearest(key, known)
        level = [each for each in known if each.rpartition(".")[0] == key.rpartition(".")[0]]
        return f"unknown key {key!r}" + (
            f"; did you mean {close!r}?" if close else f"; known: {', '.join(level)}"
        )
    if error["type"] == "missing":
        return f"{key} is missing: set {key}=..."
    message = str(error["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(error["input"], Mapping) else f" = {error['input']!r}"
    return f"{key}{given}: {message[0].lower()}{message[1:]}"
