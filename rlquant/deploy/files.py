"""A program as a folder of ``program.json`` and ``program.safetensors``.

Neither can hold code. The JSON lists buffers, operations and head, the safetensors their arrays, codes packed
as they are. The JSON carries a hash of both, so that a damaged or swapped file is noticed; it comes last, so a
folder without it is no program. Reading one needs NumPy and safetensors alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import (
    Activate,
    Affine,
    Buffer,
    Conv2d,
    Gates,
    Linear,
    OneHot,
    Op,
    Program,
    Table,
    Weight,
)
from rlquant.deploy.validate import check_parts
from rlquant.errors import InputError
from rlquant.runs import write_files

__all__ = [
    "PROGRAM_FILES",
    "SCHEMA",
    "load_program",
    "program_files",
    "program_from_files",
    "program_hash",
    "save_program",
]

SCHEMA = "rlquant.program/1"
PROGRAM_FILES = {"program.json": 2**24, "program.safetensors": 2**30}
"""The names of the files, and the most bytes that each may have."""

Tensors = dict[str, NDArray[Any]]
_OPS: dict[str, type[Op]] = {
    "affine": Affine,
    "linear": Linear,
    "conv2d": Conv2d,
    "table": Table,
    "activate": Activate,
    "one_hot": OneHot,
    "gates": Gates,
}
_NAMES = {cls: name for name, cls in _OPS.items()}


def save_program(program: Program, folder: str | Path) -> int:
    """Write a program and return its bytes. Raises InputError where the folder cannot be written to."""
    files = program_files(program)
    write_files(folder, files)
    return sum(map(len, files.values()))


def load_program(folder: str | Path) -> Program:
    """Read a program; runs none of its content.

    Raises:
        InputError: it is incomplete, damaged, of another schema, not what its hash says, or no valid program.
    """
    return program_from_files({name: _read(Path(folder) / name) for name in PROGRAM_FILES}, str(folder))


def program_files(program: Program) -> dict[str, bytes]:
    """The two files of a program by name, in the order in which they are to be written."""
    from safetensors.numpy import save

    document, tensors = _encode(program)
    document["sha256"] = _hash(document, tensors)
    return {
        "program.safetensors": save(tensors),
        "program.json": json.dumps(document, separators=(",", ":")).encode(),
    }


def program_hash(program: Program) -> str:
    """SHA-256 of all that a program consists of, in hexadecimal."""
    return _hash(*_encode(program))


def program_from_files(files: Mapping[str, bytes], source: str) -> Program:
    """The program of the files that :func:`program_files` makes.

    Args:
        files: content by name.
        source: where they come from, for messages.

    Raises:
        InputError: as :func:`load_program`.
    """
    path = Path(source)
    document = _document(files["program.json"], path / "program.json")
    tensors = _tensors(files["program.safetensors"], path / "program.safetensors")
    if document.pop("sha256", None) != _hash(document, tensors):
        raise InputError(
            f"{path} does not match its hash: program.json or program.safetensors was damaged or swapped"
        )
    try:
        return _decode(document, tensors)
    except InputError as error:
        raise InputError(f"{path} holds no valid program: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise InputError(f"{path / 'program.json'} does not describe a program: {error!r}") from None


def _encode(program: Program) -> tuple[dict[str, Any], Tensors]:
    tensors: Tensors = {}
    document = {
        "schema": SCHEMA,
        "name": program.name,
        "inputs": [{"key": key, "shape": list(shape)} for key, shape in program.inputs.items()],
        "states": [list(pair) for pair in program.states],
        "buffers": [{"size": buffer.size, "bits": buffer.bits} for buffer in program.buffers],
        "ops": [
            {"op": _NAMES[type(op)], **_encode_fields(op, f"ops.{index}", tensors)}
            for index, op in enumerate(program.ops)
        ],
        "head": _encode_fields(program.head, "head", tensors),
    }
    return document, tensors


def _encode_fields(part: Any, prefix: str, tensors: Tensors) -> dict[str, Any]:
    """What is no array, as JSON; arrays go to ``tensors`` and leave their name out."""
    entry: dict[str, Any] = {}
    for field in fields(part):
        value, name = getattr(part, field.name), f"{prefix}.{field.name}"
        if isinstance(value, np.ndarray):
            tensors[name] = np.ascontiguousarray(value)
        elif isinstance(value, Weight):
            entry[field.name] = _encode_fields(value, name, tensors)
        elif isinstance(value, tuple):
            entry[field.name] = [int(number) for number in value]
        else:
            entry[field.name] = value
    return entry


def _decode(document: dict[str, Any], tensors: Tensors) -> Program:
    entries = [(f"ops.{index}", dict(entry)) for index, entry in enumerate(document["ops"])]
    ops = tuple(_decode_fields(_OPS[entry.pop("op")], entry, prefix, tensors) for prefix, entry in entries)
    head = _decode_fields(ProgramHead, document["head"], "head", tensors)
    buffers = tuple(Buffer(**entry) for entry in document["buffers"])
    inputs = {str(entry["key"]): tuple(entry["shape"]) for entry in document["inputs"]}
    states = tuple((pair[0], pair[1]) for pair in document["states"])
    if tensors:
        raise InputError(f"nothing uses the tensor {next(iter(tensors))}")
    check_parts(buffers, inputs, ops, head, states)
    return Program(buffers, inputs, ops, head, str(document["name"]), states)


def _decode_fields(cls: Any, entry: Mapping[str, Any], prefix: str, tensors: Tensors) -> Any:
    """Takes the arrays out of ``tensors``."""
    values: dict[str, Any] = {}
    for field in fields(cls):
        name = f"{prefix}.{field.name}"
        if name in tensors:
            values[field.name] = tensors.pop(name)
        elif field.name == "weight":
            values[field.name] = _decode_fields(Weight, entry["weight"], name, tensors)
        elif field.name in entry:
            value = entry[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    unknown = set(entry) - {field.name for field in fields(cls)}
    if unknown:
        raise InputError(f"{prefix} has the unknown entry {min(unknown)!r}")
    return cls(**values)


def _hash(document: Mapping[str, Any], tensors: Tensors) -> str:
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, array in sorted(tensors.items()):
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    limit = PROGRAM_FILES[path.name]
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no file")
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise InputError(f"{path} has more than {limit:,} bytes: it is no program")
    return content


def _document(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged: it is not JSON") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f"{path} has the schema {schema!r}; this rlquant reads {SCHEMA!r}. Upgrade rlquant or export anew"
        )
    return dict(document)


def _tensors(content: bytes, path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors: Tensors = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or truncated: {error}") from None
    return tensors
