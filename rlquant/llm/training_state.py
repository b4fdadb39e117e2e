"""The state of a training run in one file: there whole or not at all, and no pickle.

Tensors go by name; everything else is JSON in the header of the safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.runs import write_files

__all__ = ["load_state", "save_state"]

_SCHEMA = "rlquant.training/1"


def save_state(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: Any, document: Mapping[str, Any]
) -> None:
    """Write parameters, the optimizer's state and a document; the file that was there is replaced at the end.

    Args:
        path: of the file.
        parameters: what is trained, by name, in the order in which the optimizer has it.
        optimizer: of torch's interface.
        document: plain JSON.

    Raises:
        InputError: the file cannot be written (a full disk, say); the one that was there is kept.
    """
    from safetensors.torch import save

    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    rest: dict[str, dict[str, Any]] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                rest.setdefault(str(index), {})[key] = value
    held = {name: tensor.to("cpu").clone().contiguous() for name, tensor in tensors.items()}
    header = {"schema": _SCHEMA, "document": document, "optimizer": rest}
    write_files(path.parent, {path.name: save(held, {"rlquant": json.dumps(header, sort_keys=True)})})


def load_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Any,
    *,
    expect: Callable[[dict[str, Any]], None] = lambda _document: None,
) -> dict[str, Any]:
    """Put a saved state back into parameters and optimizer, and return the document.

    Args:
        path, parameters, optimizer: as in :func:`save_state`.
        expect: raises where the document is of something else.

    Raises:
        InputError: the file is missing, damaged, or of other parameters; nothing is changed then.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["rlquant"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is no checkpoint that can be read: {str(error).splitlines()[0]}") from None
    if header.get("schema") != _SCHEMA:
        raise InputError(f"{path} has the schema {header.get('schema')!r}; this rlquant reads {_SCHEMA!r}")
    document: dict[str, Any] = header["document"]
    expect(document)
    saved = {
        name.removeprefix("parameter."): t for name, t in tensors.items() if name.startswith("parameter.")
    }
    if {name: tuple(t.shape) for name, t in saved.items()} != {
        n: tuple(p.shape) for n, p in parameters.items()
    }:
        raise InputError(
            f"{path} holds other parameters than are trained here: another model, or other adapters"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    states: dict[int, dict[str, Any]] = {
        int(index): dict(rest) for index, rest in header["optimizer"].items()
    }
    for name, tensor in tensors.items():
        kind, _, place = name.partition(".")
        if kind == "optimizer":
            index, _, key = place.partition(".")
            states.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    return document
