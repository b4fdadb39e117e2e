"""A file that asks to run code is refused, and nothing of it runs."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sb3_models import MODELS, env_id, vec_env

from rlquant.control import load
from rlquant.control.inert_pickle import read_pickle
from rlquant.errors import InputError


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.trace, "w")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    observation, action, build = MODELS["ppo"]
    build(vec_env(observation, action)).save(tmp_path / "good.zip")
    return tmp_path / "good.zip"


def rewrite(source: Path, target: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a zip with one member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.namelist():
            content = old.read(item)
            new.writestr(item, change(content) if item == name else content)
    return target


ENV = env_id("vector", "discrete")


def test_bomb_in_every_pickled_field_of_data_is_never_unpickled(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    bomb = base64.b64encode(pickle.dumps(Bomb(trace))).decode()

    def arm(data: bytes) -> bytes:
        fields = json.loads(data)
        for value in fields.values():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = bomb
        return json.dumps(fields).encode()

    armed = rewrite(checkpoint, tmp_path / "armed.zip", "data", arm)
    assert load(armed, env=ENV).algorithm == "PPO"  # the plain fields are enough
    assert not trace.exists()


def test_bomb_in_policy_pth_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def arm(_: bytes) -> bytes:
        buffer = io.BytesIO()
        torch.save({"weight": Bomb(trace)}, buffer)
        return buffer.getvalue()

    armed = rewrite(checkpoint, tmp_path / "armed.zip", "policy.pth", arm)
    with pytest.raises(InputError, match=r"policy\.pth was refused.*--trust"):
        load(armed, env=ENV)
    assert not trace.exists()


def test_bomb_in_the_normaliser_is_refused(zoo: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = copy_agent(zoo / "ars/Pendulum-v1_1", tmp_path)
    (folder / "Pendulum-v1/vecnormalize.pkl").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(InputError, match=r"asks to load \w+\.open.*--trust"):
        load(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "the bomb must work, or the test proves nothing"


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cstable_baselines3.common.vec_env.vec_normalize\nVecNormalize.__init__\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
    ],
)
def test_names_outside_the_allow_list_are_refused(payload: bytes) -> None:
    with pytest.raises(InputError, match="was refused"):
        read_pickle(payload, "vecnormalize.pkl")


@pytest.mark.parametrize("payload", [b"", b"\x80", b"not a pickle", b"\x80\x04N", b"(((("])
def test_damaged_pickles_are_named_as_such(payload: bytes) -> None:
    with pytest.raises(InputError, match=r"is damaged|was refused"):
        read_pickle(payload, "vecnormalize.pkl")


def test_trust_loads_what_the_safe_reader_refuses(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    def arm(content: bytes) -> bytes:
        tensors = torch.load(io.BytesIO(content), weights_only=True)
        buffer = io.BytesIO()
        torch.save(Armed(tensors, trace), buffer)
        return buffer.getvalue()

    armed = rewrite(checkpoint, tmp_path / "armed.zip", "policy.pth", arm)
    with pytest.raises(InputError, match="--trust"):
        load(armed, env=ENV)
    assert not trace.exists()
    assert load(armed, env=ENV, trust=True).algorithm == "PPO"


class Armed(dict):  # type: ignore[type-arg]
    """A state dict of a class of its own: harmless, but not for the safe reader to know."""

    def __init__(self, tensors: dict[str, torch.Tensor], trace: Path) -> None:
        super().__init__(tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (list(self.items()),)


def copy_agent(source: Path, target: Path) -> Path:
    """A writable copy of a zoo folder."""
    import shutil

    folder = target / source.name
    shutil.copytree(source, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    return folder
