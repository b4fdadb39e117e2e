"""Run folders: what a run writes survives a crash, and a repeated command goes on where it stopped.

Files are written under a temporary name and renamed, so a reader sees the old file or the new one, never a
half. Finished pieces are kept under ``pieces/`` with a fingerprint of everything that determines them; a
piece with another fingerprint is not reused. Results of other settings are moved to ``previous/``, not lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlquant.errors import InputError

__all__ = ["RunFolder", "file_hash", "machine_info", "package_versions", "write_atomic", "write_files"]

_PACKAGES = (
    *("rlquant", "torch", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib", "mujoco", "Box2D"),
    *("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"),
)
_LONGEST_NAME = 150


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut.

    Raises:
        InputError: the folder cannot be written to; the message says why.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def file_hash(*paths: Path) -> str:
    """SHA-256 of files one after the other, in hexadecimal; large ones are never held in memory.

    Raises:
        InputError: one cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def write_files(folder: str | Path, files: Mapping[str, str | bytes]) -> None:
    """Write files into a folder, made if missing, in their order, each as :func:`write_atomic` does.

    Raises:
        InputError: the folder cannot be created or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be created: {error.strerror}") from None
    for name, content in files.items():
        write_atomic(path / name, content)


class RunFolder:
    """The folder of one run.

    Args:
        path: created if missing.
        settings: plain JSON of everything that determines the results.
        writes: whether this process writes; of several that run together one does, and the others read.

    Raises:
        InputError: the folder cannot be created or written to.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        canonical = json.dumps(settings, sort_keys=True, default=str)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        if not writes:
            return
        try:
            (self.path / "pieces").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the output folder {path} cannot be created: {error.strerror}; choose another with --out"
            ) from None
        self._keep_previous()
        write_atomic(self.path / "settings.json", json.dumps(settings, indent=1, sort_keys=True, default=str))
        write_atomic(self.path / "pieces" / "fingerprint", self.fingerprint)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints of exactly these settings lie: those of others are never resumed."""
        return self.path / "checkpoints" / self.fingerprint

    def piece(self, name: str) -> dict[str, Any] | None:
        """A piece that an earlier, interrupted run of the same settings left behind."""
        try:
            stored = json.loads(self._piece_path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        matches = isinstance(stored, dict) and stored.get("fingerprint") == self.fingerprint
        return stored["content"] if matches else None

    def save_piece(self, name: str, content: dict[str, Any]) -> None:
        """Keep a piece; JSON keeps every float exactly."""
        document = {"fingerprint": self.fingerprint, "content": content}
        self._write(self._piece_path(name), json.dumps(document))

    def tensors(self, name: str) -> dict[str, Any] | None:
        """Tensors that an earlier, interrupted run of the same settings left behind, on the CPU."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._piece_path(name, "safetensors"), framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        except (OSError, SafetensorError):
            return None

    def save_tensors(self, name: str, tensors: Mapping[str, Any]) -> None:
        """Keep tensors as a piece."""
        from safetensors.torch import save

        held = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
        self._write(self._piece_path(name, "safetensors"), save(held, {"fingerprint": self.fingerprint}))

    def drop_tensors(self, name: str) -> None:
        """Remove tensors that are of no use any more; there may be none."""
        self._piece_path(name, "safetensors").unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove what is only of use to an interrupted run."""
        for piece in (self.path / "pieces").glob("*"):
            piece.unlink()
        (self.path / "pieces").rmdir()

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a result file and return its path."""
        self._write(self.path / name, content)
        return self.path / name

    def _write(self, path: Path, content: str | bytes) -> None:
        if self.writes:
            write_atomic(path, content)

    def _piece_path(self, name: str, kind: str = "json") -> Path:
        plain = re.sub(r"[^\w.-]", "_", name)
        if len(plain) > _LONGEST_NAME:  # a scheme with many exceptions; file systems stop at 255 bytes
            plain = f"{plain[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return self.path / "pieces" / f"{plain}.{kind}"

    def _keep_previous(self) -> None:
        """Move the results of other settings aside."""
        marker = self.path / "pieces" / "fingerprint"
        old = marker.read_text(encoding="utf-8").strip() if marker.is_file() else ""
        if not old or old == self.fingerprint:
            return
        keep = self.path / "previous" / old
        try:
            if (self.path / "results.json").is_file():
                keep.mkdir(parents=True, exist_ok=True)
                for name in ("results.json", "report.html", "settings.json"):
                    if (self.path / name).is_file():
                        (self.path / name).replace(keep / name)
            for piece in (self.path / "pieces").glob("*.*"):
                piece.unlink()
        except OSError as error:
            raise InputError(
                f"the output folder {self.path} cannot be written to: {error.strerror}"
            ) from None


def machine_info(device: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on."""
    info: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "device": device,
    }
    if device.startswith("cuda"):
        import torch

        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def package_versions() -> dict[str, str]:
    """Versions of the packages that determine the results; those that are not installed are left out."""
    from importlib import metadata  # slow to import, and a loaded policy waits for this module

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
