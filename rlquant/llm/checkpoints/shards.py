"""The tensors of a model folder, read from its safetensors files when they are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.folders import WEIGHTS

__all__ = ["INDEX", "LayerTensors", "Shards"]

INDEX = "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")


class Shards:
    """The tensors of a folder by name.

    Raises:
        InputError: there is no safetensors file, a shard is missing or a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in _paths(folder):
            file = _open(path)
            self._files |= dict.fromkeys(file.keys(), file)
            self._paths |= dict.fromkeys(file.keys(), path)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Those that have not been taken."""
        return list(self._files)

    def take(self, name: str) -> Tensor:
        """A tensor, which is then no longer here."""
        if name not in self._files:
            raise InputError(f"{self.folder} is incomplete: the tensor {name} is missing")
        tensor: Tensor = self._files.pop(name).get_tensor(name)
        return tensor

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor in memory of its own, which stays here.

        Its file is opened and closed for it: pages of a file count as the process's memory while it is mapped.
        """
        with _open(self._paths[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.to(dtype, copy=True)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InputError where a tensor is no float of this shape, by the head of its file alone."""
        entry = self._files[name].get_slice(name)
        found, dtype = entry.get_shape(), entry.get_dtype()
        if tuple(found) != shape or dtype not in _FLOATS:
            raise InputError(
                f"{name} does not fit the model's config.json: it is {dtype} {list(found)}, not a float {list(shape)}"
            )


class LayerTensors:
    """The tensors of one layer, by the last part of their names."""

    def __init__(self, shards: Shards, layer: str) -> None:
        self._shards, self.layer = shards, layer

    def __contains__(self, part: str) -> bool:
        return f"{self.layer}.{part}" in self._shards

    def name(self, part: str) -> str:
        """In full."""
        return f"{self.layer}.{part}"

    def take(self, part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """A tensor of this shape and one of these dtypes, any floating dtype where none is named.

        Raises:
            InputError: it is missing or another; it is named.
        """
        tensor = self._shards.take(self.name(part))
        fits = tensor.dtype in dtypes if dtypes else tensor.is_floating_point()
        if tuple(tensor.shape) != shape or not fits:
            kind = " or ".join(str(each).removeprefix("torch.") for each in dtypes) or "float"
            raise InputError(
                f"{self.name(part)} does not fit the model's config.json: it is "
                f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, not {kind} {list(shape)}"
            )
        return tensor

    def take_scale(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """Scales as float32, all of them finite. Raises InputError as :meth:`take`."""
        scale = self.take(part, shape).to(torch.float32)
        if not bool(scale.isfinite().all()):
            raise InputError(f"{self.name(part)} is damaged: it holds NaN or Inf")
        return scale


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or missing: {error}") from None


def _paths(folder: Path) -> list[Path]:
    """As transformers chooses them; GPTQ's files have names of their own."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.exists():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(places))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index} is damaged: it is no index of tensors") from None
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = [path.name for path in sorted((*folder.glob("*.bin"), *folder.glob("*.pt")))]
        hint = f"; {pickled[0]} is a pickle, which is not read" if pickled else ""
        raise InputError(f"{folder} holds no *.safetensors{hint}")
    return found
