"""Reads a Stable-Baselines3 checkpoint without running any code.

An SB3 zip holds ``data`` (JSON in which each complex object is a base64 pickle *beside* its plain fields) and
``policy.pth`` (a torch state dict). Only the plain fields are read, and the tensors through torch's
``weights_only`` unpickler. Everything that a deployable policy needs can be known from these two.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlquant.control.spaces import Space
from rlquant.errors import InputError

__all__ = ["ALGORITHMS", "Checkpoint", "guess_by_fields", "read_checkpoint", "read_data"]

ALGORITHMS = (
    *("A2C", "PPO", "DQN", "DDPG", "TD3", "SAC"),
    *("TQC", "QRDQN", "TRPO", "ARS", "RecurrentPPO", "MaskablePPO"),
)

_MAX_MEMBER = 4 * 2**30  # bytes; no policy network is larger, a zip bomb is
_POLICY_MODULES = {
    "sb3_contrib.tqc.policies": "TQC",
    "sb3_contrib.qrdqn.policies": "QRDQN",
    "sb3_contrib.ars.policies": "ARS",
    "sb3_contrib.common.recurrent.policies": "RecurrentPPO",
    "sb3_contrib.common.maskable.policies": "MaskablePPO",
    "sb3_contrib.ppo_recurrent.policies": "RecurrentPPO",
    "sb3_contrib.ppo_mask.policies": "MaskablePPO",
    "sb3_contrib.trpo.policies": "TRPO",
    "stable_baselines3.dqn.policies": "DQN",
    "stable_baselines3.sac.policies": "SAC",
}


@dataclass(frozen=True)
class Checkpoint:
    """What was read from an SB3 zip.

    Attributes:
        path: the file.
        algorithm: SB3's class name, one of :data:`ALGORITHMS`.
        data: the plain JSON fields.
        tensors: the policy's state dict, on the CPU.
        sha256: of the file.
    """

    path: Path
    algorithm: str
    data: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    sha256: str

    @property
    def observation_space(self) -> Space:
        """The space that the policy network was built for (after frame stacking and image transposition)."""
        return Space.from_sb3(self.data["observation_space"])

    @property
    def action_space(self) -> Space:
        """The action space that the policy was trained in."""
        return Space.from_sb3(self.data["action_space"])

    @property
    def policy_kwargs(self) -> dict[str, Any]:
        """The plain fields of ``policy_kwargs``; classes appear as the text ``<class '...'>``."""
        kwargs = self.data.get("policy_kwargs")
        plain = dict(kwargs) if isinstance(kwargs, dict) else {}
        if "Linear policy" in str(self.data["policy_class"].get("__doc__", "")):
            plain.setdefault("squash_output", False)  # the default of ARS' linear policy
        return plain


# Fields that only one algorithm's checkpoint has, the more special first.
_FIELDS = {
    "top_quantiles_to_drop_per_net": "TQC",
    "n_quantiles": "QRDQN",
    "cg_max_steps": "TRPO",
    "n_delta": "ARS",
    "clip_range": "PPO",
    "target_entropy": "SAC",
    "target_policy_noise": "TD3",
    "exploration_fraction": "DQN",
}


def read_checkpoint(path: Path, *, trust: bool = False) -> Checkpoint:
    """Read an SB3 zip; runs none of its code.

    Args:
        path: the zip.
        trust: unpickle ``policy.pth`` whatever it holds, which does run its code.

    Raises:
        InputError: it is missing, no SB3 zip, truncated, of an unknown algorithm, holds anything but
            finite tensors, or asks to run code.
    """
    content = _read_file(path)
    with _open_zip(path, content) as archive:
        data = _read_json(path, archive)
        tensors = _read_tensors(path, archive, trust)
    sha256 = hashlib.sha256(content).hexdigest()
    return Checkpoint(path, _algorithm(path, data), data, tensors, sha256)


def read_data(path: Path) -> dict[str, Any]:
    """The plain JSON fields of an SB3 zip. Raises InputError as :func:`read_checkpoint` does."""
    with _open_zip(path, _read_file(path)) as archive:
        return _read_json(path, archive)


def guess_by_fields(data: dict[str, Any]) -> str:
    """The algorithm, from its hyper-parameters alone: for policies whose class does not tell."""
    return next((algorithm for field, algorithm in _FIELDS.items() if field in data), "A2C")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _open_zip(path: Path, content: bytes) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile:
        kind = "is truncated or damaged" if content[:2] == b"PK" else "is no zip file"
        raise InputError(
            f"{path} {kind}; a Stable-Baselines3 checkpoint is the .zip that model.save() writes"
        ) from None
    if min((item.header_offset for item in archive.infolist()), default=0) > 0:
        # Cut before its directory, the file shows that of a torch archive inside it.
        raise InputError(f"{path} is truncated or damaged; save the model again")
    names = set(archive.namelist())
    missing = {"data", "policy.pth"} - names
    if missing:
        found = ", ".join(sorted(names)[:5]) or "nothing"
        raise InputError(
            f"{path} is no Stable-Baselines3 zip: it lacks {', '.join(sorted(missing))} (it holds {found})"
        )
    return archive


def _read_member(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > _MAX_MEMBER:
        raise InputError(f"{path}: {name} would unpack to {size:,} bytes; refused above {_MAX_MEMBER:,}")
    try:
        return archive.read(name)
    except Exception as error:  # zlib, CRC, truncated member, unsupported compression or encryption
        raise InputError(f"{path} is truncated or damaged: {name} cannot be unpacked ({error})") from None


def _read_json(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        data = json.loads(_read_member(path, archive, "data"))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no Stable-Baselines3 zip: its 'data' is not JSON") from None
    needed = ("policy_class", "observation_space", "action_space")
    if not isinstance(data, dict) or not all(isinstance(data.get(key), dict) for key in needed):
        raise InputError(f"{path} is no Stable-Baselines3 zip: its 'data' lacks one of {', '.join(needed)}")
    return data


def _read_tensors(path: Path, archive: zipfile.ZipFile, trust: bool) -> dict[str, torch.Tensor]:
    raw = _read_member(path, archive, "policy.pth")
    try:
        tensors = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=not trust)
    except Exception as error:
        reason = str(error).strip().splitlines()
        detail = next(
            (line for line in reason if "GLOBAL" in line or "global" in line), reason[0] if reason else ""
        )
        raise InputError(
            f"{path}: policy.pth was refused, it is not a plain state dict ({detail.strip()[:200]}). Nothing was "
            "run. If you trust its author, repeat with --trust"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise InputError(f"{path}: policy.pth holds no state dict of tensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: the weights {name!r} hold NaN or Inf; this agent diverged in training")
    return dict(tensors)


def _algorithm(path: Path, data: dict[str, Any]) -> str:
    """The algorithm, from the policy's module and from the fields that only one of its users has."""
    module = str(data["policy_class"].get("__module__", ""))
    if module in _POLICY_MODULES:
        return _POLICY_MODULES[module]
    if module == "stable_baselines3.td3.policies":
        # SB3's DDPG is TD3 with a delay of one and no target noise.
        return "DDPG" if data.get("policy_delay") == 1 and not data.get("target_noise_clip") else "TD3"
    if module in (
        "stable_baselines3.common.policies",
        "stable_baselines3.ppo.policies",
        "stable_baselines3.a2c.policies",
    ):
        return guess_by_fields(data)
    raise InputError(
        f"{path}: the policy class comes from {module or 'an unknown module'}, which is not one of the "
        f"supported algorithms' ({', '.join(ALGORITHMS)}). If you trust its author, repeat with --trust"
    )
