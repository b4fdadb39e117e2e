"""Float weights that stay in their files until they are needed, so that a model larger than the memory quantizes.

A folder's model is made on the meta device, where weights have shapes and no bytes. Each part is read when its turn
comes: what is then in memory is that part, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rlquant.errors import InputError
from rlquant.llm.checkpoints.shards import INDEX, Shards
from rlquant.llm.folders import WEIGHTS, empty_model, remake_buffers

__all__ = ["UnreadWeights", "open_unread"]


class UnreadWeights:
    """The float weights of a folder, by their names in the model.

    Args:
        model: on the meta device, what is tied tied.
        shards: tensors of the model's names and shapes.
    """

    def __init__(self, model: Any, shards: Shards) -> None:
        self.model, self.shards = model, shards

    def read_(self, part: nn.Module, name: str = "") -> None:
        """Read what is not in memory yet of a part of the model, in place, onto the CPU and in the model's dtype.

        Args:
            part: the model itself or a module of it.
            name: of the part in the model.

        Raises:
            InputError: a file was changed since it was opened.
        """
        for module, full, key, parameter in _parameters(part, name):
            if parameter.is_meta and full in self.shards:
                tensor = self.shards.read(full, parameter.dtype)
                module.register_parameter(key, nn.Parameter(tensor, parameter.requires_grad))
        if not name:
            self.model.tie_weights()


def open_unread(folder: Path, dtype: str) -> UnreadWeights | None:
    """The model of a folder with safetensors, all weights unread; None where transformers does more than copy tensors
    by their names, and has to load it whole: pickles, code or names of its own, parts that stay in float32.

    Args:
        folder: with config.json and model.safetensors, or shards and their index.
        dtype: of the model.

    Raises:
        InputError: a shard or tensor is missing, damaged or of another shape than config.json says.
    """
    if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        return None
    shards = Shards(folder)
    model = empty_model(folder, dtype)
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        return None
    model.tie_weights()
    wanted = dict(model.named_parameters())
    known = model.state_dict().keys()
    stored = set(shards.names())
    buffers = known - dict(model.named_parameters(remove_duplicate=False)).keys()
    if buffers or stored & (known - wanted.keys()):  # a tied head with a tensor of its own may not be tied
        return None
    missing = [name for name in wanted if name not in stored]
    if missing and stored - known:
        return None
    if missing:
        raise InputError(f"{folder} is incomplete: the tensor {missing[0]} is missing")
    for name, parameter in wanted.items():
        shards.check(name, tuple(parameter.shape))
    remake_buffers(model)
    return UnreadWeights(model.eval(), shards)


def _parameters(part: nn.Module, name: str) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Each parameter of a module's own, with its module, its full name and its name there."""
    for prefix, module in part.named_modules(prefix=name):
        for key, parameter in list(module.named_parameters(recurse=False)):
            yield module, f"{prefix}.{key}" if prefix else key, key, parameter
