"""Reward models as folders: a plain PEFT adapter, ``head.safetensors``, and ``reward.json``, which comes last.

As a reward of PPO or GRPO, :class:`ModelReward` reads prompts and completions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.adapters import save_adapter
from rlquant.llm.heads import ScoreHead
from rlquant.llm.model import LanguageModel
from rlquant.llm.roles import Roles
from rlquant.runs import file_hash, write_files

__all__ = ["ModelReward", "load_reward_model", "right_padded", "save_reward_model", "write_reward_model"]

_HEAD, _MARK, SCHEMA = "head.safetensors", "reward.json", "rlquant.reward/1"


def save_reward_model(roles: Roles, folder: str | Path) -> None:
    """Write the reward model of some roles.

    Raises:
        InputError: there is none, or the folder cannot be written to.
    """
    if "reward" not in roles.heads:
        raise InputError("there is no reward model to save: add one or load one")
    write_reward_model(roles.model, "reward", roles.heads["reward"], roles.lm, folder)


def write_reward_model(
    model: Any, adapter: str, head: ScoreHead, lm: LanguageModel, folder: str | Path
) -> None:
    """Write an adapter of a model on the base ``lm`` and its head as a reward model.

    Raises:
        InputError: there is no such adapter, or the folder cannot be written to.
    """
    from safetensors.torch import save

    path = Path(folder)
    (path / _MARK).unlink(missing_ok=True)
    save_adapter(model, adapter, path)
    state = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_files(path, {_HEAD: save(state, {"format": "pt"})})
    document = {"schema": SCHEMA, "base": _base(lm), "sha256": file_hash(path / _HEAD)}
    write_files(path, {_MARK: json.dumps(document, indent=1)})


def load_reward_model(roles: Roles, folder: str | Path, *, trainable: bool = False) -> None:
    """Give some roles the reward model of a folder; a base other than the one it was trained on is warned of.

    Raises:
        InputError: the folder is incomplete, damaged, or of a model of other sizes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder)
    document = _document(path)
    if file_hash(path / _HEAD) != document.get("sha256"):
        raise InputError(f"{path / _HEAD} does not match its hash in {_MARK}: it was damaged or swapped")
    roles.load("reward", path, trainable=trainable)
    try:
        state = load_file(path / _HEAD)
        head = ScoreHead(len(state["weight"]), seed=None)
        head.load_state_dict(state)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path / _HEAD} is damaged: {str(error).splitlines()[0]}") from None
    for parameter in head.parameters():
        parameter.requires_grad_(trainable)
    roles.heads["reward"] = head.to(roles.lm.device)
    there, here = document.get("base", {}), _base(roles.lm)
    changed = [key for key in here if there.get(key) and here[key] and there[key] != here[key]]
    if changed:
        known = ", ".join(f"{key} {there[key]} (here {here[key]})" for key in changed)
        warnings.warn(f"the reward model in {path} was trained on another base: {known}", stacklevel=2)


class ModelReward:
    """The reward model of some roles as a reward function: ``(prompts, completions, rows) -> scores``.

    Args:
        roles: with a reward model.
        batch: answers that are scored together.
        end: token id put behind each answer, as in training; by default the tokenizer's eos. None puts nothing.
    """

    def __init__(self, roles: Roles, *, batch: int = 8, end: int | str | None = "eos") -> None:
        if "reward" not in roles.heads:
            raise InputError("there is no reward model: load one first")
        self.roles, self.batch = roles, batch
        self.end = roles.lm.tokenizer.eos_token_id if end == "eos" else end

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Any]
    ) -> list[float]:
        """Score each answer after its prompt."""
        lm, after = self.roles.lm, [] if self.end is None else [int(self.end)]
        scores: list[float] = []
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            read = [
                (lm.tokens(prompt) + lm.tokens(completion) + after)[-lm.longest :]
                for prompt, completion in zip(prompts[part], completions[part], strict=True)
            ]
            ids, mask = right_padded(read, lm.device)
            scores += self.roles.rewards(ids, mask).tolist()
        return scores


def right_padded(sequences: Sequence[Sequence[int]], device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids of different lengths as int64 ``[batch, longest]`` and the mask that says which count."""
    longest = max(len(each) for each in sequences)
    ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in sequences], device=device)
    lengths = torch.tensor([len(each) for each in sequences], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]


def _base(lm: LanguageModel) -> dict[str, str]:
    return {"precision": lm.precision, "method": lm.method, "sha256": lm.sha256}


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path} holds no {_MARK}: it is no finished reward model") from None
    except ValueError:
        raise InputError(f"{path / _MARK} is damaged: it is not JSON") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise InputError(f"{path / _MARK} has the schema {schema!r}; this rlquant reads {SCHEMA!r}")
    return dict(document)
