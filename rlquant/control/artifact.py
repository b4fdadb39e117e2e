"""The artifact: a quantized policy as a folder of ``policy.safetensors`` and ``policy.json``.

Neither can hold code. The JSON tells the architecture, the scheme, the observation map with its normaliser,
the head and the environment; the safetensors hold packed codes, scales, zero points and biases, and nothing
else. The JSON carries the hash of the tensors, so that a damaged or swapped file is noticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlquant.control.actor import Actor
from rlquant.control.agent import Agent
from rlquant.control.environment import EnvSpec
from rlquant.control.head import Head
from rlquant.control.input_bits import apply_scheme_
from rlquant.control.observation import ObservationPart
from rlquant.errors import InputError
from rlquant.quant import MixedScheme, prepare_empty_
from rlquant.runs import write_files

__all__ = ["SCHEMA", "agent_from_files", "artifact_files", "load_artifact", "save_artifact"]

SCHEMA = "rlquant.policy/1"
FILES = ("policy.json", "policy.safetensors")


def artifact_files(agent: Agent) -> dict[str, bytes]:
    """The two files of an artifact by name.

    Raises:
        InputError: the network has a layer that plain JSON cannot tell (a custom module).
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in agent.actor.state_dict().items()}
    weights = save(tensors)
    document = {
        "schema": SCHEMA,
        "algorithm": agent.algorithm,
        "source": agent.source,
        "source_sha256": agent.sha256,
        "parameters": agent.parameters,
        "precision": agent.precision,
        "method": agent.method,
        "actor": agent.actor.describe(),
        "head": agent.head.to_json(),
        "observation": {key: part.to_json() for key, part in agent.parts.items()},
        "env": agent.env.to_json(),
        "masked": agent.masked,
        "tensors_sha256": hashlib.sha256(weights).hexdigest(),
    }
    return {"policy.safetensors": weights, "policy.json": json.dumps(document, indent=1).encode()}


def save_artifact(agent: Agent, folder: str | Path) -> int:
    """Write an artifact and return its bytes. ``policy.json`` comes last: a folder without it is no artifact.

    Raises:
        InputError: the folder cannot be written to, or the network cannot be told in JSON.
    """
    files = artifact_files(agent)
    write_files(folder, files)
    return sum(map(len, files.values()))


def load_artifact(folder: str | Path) -> Agent:
    """Load an artifact; runs none of its content.

    Raises:
        InputError: it is incomplete, damaged, of a newer schema, or its tensors are not those it was saved with.
    """
    files = {}
    for name in FILES:
        path = Path(folder) / name
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return agent_from_files(files, str(folder))


def agent_from_files(files: Mapping[str, bytes], source: str) -> Agent:
    """The agent of an artifact's files, as :func:`artifact_files` makes them; runs none of their content.

    Args:
        files: content by name.
        source: where they come from, for the agent and for messages.

    Raises:
        InputError: as :func:`load_artifact`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(source)
    document, raw = _document(files["policy.json"], path / "policy.json"), files["policy.safetensors"]
    if hashlib.sha256(raw).hexdigest() != document["tensors_sha256"]:
        raise InputError(
            f"{path / 'policy.safetensors'} is not the file that policy.json was saved with; it was damaged or swapped"
        )
    try:
        return _agent(document, load(raw), path)
    except (KeyError, TypeError, RuntimeError, AttributeError, ValueError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path / 'policy.json'} does not describe its tensors: {error}") from None


def _document(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError:
        raise InputError(f"{path} is damaged: it is not JSON") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(
            f"{path} has the schema {schema!r}; this rlquant reads {SCHEMA!r}. Upgrade rlquant or export anew"
        )
    return dict(document)


def _agent(document: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> Agent:
    actor = Actor.build(document["actor"])
    apply_scheme_(
        actor,
        MixedScheme.parse(document["precision"]),
        lambda module, base, schemes: prepare_empty_(module, base, schemes=schemes),
    )
    actor.load_state_dict(tensors)
    parts = {key: ObservationPart.from_json(part) for key, part in document["observation"].items()}
    return Agent(
        actor.eval().requires_grad_(False),
        Head.from_json(document["head"]),
        parts,
        EnvSpec.from_json(document["env"]),
        document["algorithm"],
        source=str(path),
        sha256=document["tensors_sha256"],
        masked=bool(document["masked"]),
        precision=document["precision"],
        method=document["method"],
        parameters=int(document["parameters"]),
        origin=(str(document["source"]), str(document["source_sha256"])),
    )
