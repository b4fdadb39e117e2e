"""Rewards by name: a function in a Python file, a reward model's folder, or several of them with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rlquant import catalog
from rlquant.errors import InputError, unknown_name
from rlquant.llm.reward_model import ModelReward, load_reward_model
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import Reward, scores_of

__all__ = ["load_reward", "reward_for_trl"]


def load_reward(named: str | Mapping[str, float], roles: Callable[[], Roles]) -> Reward:
    """A reward by its name.

    Args:
        named: ``FILE.py:FUNCTION``, a folder that ``reward-qlora`` wrote, or a weight for each of several. A function
            is called with ``(prompts, completions, rows)`` and gives a number for each.
        roles: makes or gives the roles that a reward model joins.

    Raises:
        InputError: there is no such file, function or folder, or more than one reward model.
    """
    weights = {named: 1.0} if isinstance(named, str) else dict(named)
    if not weights:
        raise InputError("no reward is named: reward=FILE.py:FUNCTION or reward=FOLDER")
    parts: list[tuple[float, Reward]] = []
    models = 0
    for source, weight in weights.items():
        file, colon, function = source.rpartition(":")
        if colon and file.endswith(".py"):
            parts.append((weight, _function(Path(file).expanduser(), function)))
            continue
        if not Path(source).expanduser().is_dir():
            raise InputError(
                f"the reward {source!r} is neither FILE.py:FUNCTION nor the folder of a reward model"
            )
        models += 1
        if models > 1:
            raise InputError(f"{source} is a second reward model, and the base takes one: keep one of them")
        held = roles()
        load_reward_model(held, Path(source).expanduser())
        parts.append((weight, ModelReward(held)))

    def reward(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
        totals = [0.0] * len(prompts)
        for weight, part in parts:
            scores = part(prompts, completions, rows)
            if len(scores) != len(prompts):
                return [*scores]  # whoever called says so
            totals = [total + weight * score for total, score in zip(totals, scores, strict=True)]
        return totals

    return reward


def reward_for_trl(reward: Reward, rows: Mapping[str, Mapping[str, Any]]) -> Callable[..., list[float]]:
    """A reward as TRL calls it, for prompts that are text; ``rows`` are found by their prompt."""
    numbers = {prompt: number for number, prompt in enumerate(rows)}

    def called(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        found = [dict(rows[prompt]) for prompt in prompts]
        return scores_of(reward, list(prompts), list(completions), found, [numbers[each] for each in prompts])

    return called


def _function(file: Path, name: str) -> Reward:
    if not file.is_file():
        raise InputError(f"the reward's file {file} is not there")
    try:
        module = catalog.module_of(file, "rewards")
    except Exception as error:  # of the user's own code
        raise InputError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise unknown_name(f"function in {file}:", name, known)
    reward: Reward = found
    return reward
