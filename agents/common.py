"""What the training scripts and the scorer share: environments by card, one seeded episode, the best actor kept."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import platform
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from rlquant.control import EnvSpec
from rlquant.control import make_env as make_from
from rlquant.control.slim import save_actor

AGENTS = Path(__file__).resolve().parent
ENVS = AGENTS.parent / "envs"
SELECTION_SEED = 30_000  # episodes that choose the checkpoint; apart from the seeds that score it


def make_env(env_id: str) -> gym.Env[Any, Any]:
    """The environment that the card ``envs/<env_id>.yml`` describes."""
    return make_from(env_spec(env_id))


def env_spec(env_id: str) -> EnvSpec:
    """What the card ``envs/<env_id>.yml`` says of making its environment."""
    card = yaml.safe_load((ENVS / f"{env_id}.yml").read_text())
    return EnvSpec(card["make"]["id"], card["make"]["kwargs"])


def play(model: BaseAlgorithm, env: gym.Env[Any, Any], seed: int) -> float:
    """The return of one deterministic episode that starts from ``env.reset(seed=seed)``."""
    observation, _ = env.reset(seed=seed)
    state, total, done = None, 0.0, False
    start = np.ones(1, dtype=bool)
    while not done:
        action, state = model.predict(observation, state=state, episode_start=start, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        done = terminated or truncated
        start = np.zeros(1, dtype=bool)
    return total


class KeepBest:
    """Plays selection episodes now and then, and keeps the best actor so far: ``agent.zip`` and its card.

    Ties go to the later checkpoint: where all reach the highest return, longer training is the more robust.
    """

    def __init__(self, config: Any, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.env = make_env(config.env)
        self.best = -np.inf
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, model: BaseAlgorithm, step: int) -> float:
        """The mean return of ``config.eval_episodes`` episodes at training step ``step``."""
        seeds = range(SELECTION_SEED, SELECTION_SEED + self.config.eval_episodes)
        mean = float(np.mean([play(model, self.env, seed) for seed in seeds]))
        if mean >= self.best:
            self.best = mean
            save_actor(model, self.folder / "agent.zip")
            write_card(self.folder, training_card(self.config, model, step, mean))
        print(f"{self.config.agent} step {step}: return {mean:.1f}, best {self.best:.1f}", flush=True)
        return mean


class EvaluateEvery(BaseCallback):
    """Calls ``keep_best`` about every ``every`` environment steps of a Stable-Baselines3 training."""

    def __init__(self, keep_best: KeepBest, every: int) -> None:
        super().__init__()
        self.keep_best, self.every, self.next = keep_best, every, every

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.next:
            self.keep_best(self.model, self.num_timesteps)
            self.next += self.every
        return True

    def _on_training_end(self) -> None:
        self.keep_best(self.model, self.num_timesteps)


def training_card(config: Any, model: BaseAlgorithm, step: int, selection_return: float) -> dict[str, Any]:
    """What a card says of the training; ``score.py`` adds the score."""
    settings = dataclasses.asdict(config)
    arguments = [f"--{name.replace('_', '-')} {settings[name]}" for name in config.overrides]
    for name in ("agent", "env", "seed", "total_timesteps", "overrides"):
        settings.pop(name)
    return {
        "name": config.agent,
        "algorithm": type(model).__name__,
        "env": config.env,
        "policy": model.policy_class.__name__,
        "network": describe(model.policy),
        "hyperparameters": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
        "total_timesteps": config.total_timesteps,
        "checkpoint": {
            "timesteps": step,
            "mean_return": round(selection_return, 3),
            "how": f"best evaluation during training, {config.eval_episodes} episodes from seed {SELECTION_SEED}",
        },
        "seed": config.seed,
        "script": f"agents/{Path(sys.argv[0]).name}",
        "command": " ".join([f"python agents/{Path(sys.argv[0]).name} --agent {config.agent}", *arguments]),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "stable-baselines3": stable_baselines3.__version__,
            "torch": str(torch.__version__),
            "gymnasium": gym.__version__,
            "numpy": np.__version__,
        },
        "license": "Apache-2.0",
    }


def describe(policy: torch.nn.Module) -> str:
    """The actor's layers as sizes and activation, such as ``17-256-256-6, ReLU``."""
    parts: list[str] = []
    activations: list[str] = []
    for name, module in policy.named_modules():
        if any(word in name for word in ("critic", "value_net", "target", "vf_", "log_std")):
            continue
        if isinstance(module, torch.nn.Conv2d):
            parts += [
                f"conv{module.kernel_size[0]}x{module.kernel_size[1]}/{module.stride[0]}:{module.out_channels}"
            ]
        elif isinstance(module, torch.nn.LSTM):  # registered last, applied first
            parts = [str(module.input_size), f"lstm{module.hidden_size}", *parts[1:]]
        elif isinstance(module, torch.nn.Linear):
            parts += (
                [str(module.out_features)] if parts else [str(module.in_features), str(module.out_features)]
            )
        elif isinstance(module, (torch.nn.ReLU, torch.nn.Tanh)) and type(module).__name__ not in activations:
            activations.append(type(module).__name__)
    return f"{'-'.join(parts)}, {'/'.join(activations)}"


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write ``card.yml``, with the checksum of the ``agent.zip`` beside it, in one move."""
    digest = hashlib.sha256((folder / "agent.zip").read_bytes()).hexdigest()
    write_yaml(folder / "card.yml", {**card, "sha256": digest})


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` in one move, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(yaml.safe_dump(content, sort_keys=False, width=110, allow_unicode=True))
    os.replace(temporary, path)


def parse(agents: dict[str, Any], arguments: Sequence[str] | None = None) -> tuple[Any, Path]:
    """The configuration of ``--agent NAME`` with every ``--field value`` given put in, and the ``--out`` folder.

    ``agents`` maps a name to its tuned dataclass; the fields become options of the same name.
    """
    import argparse

    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--agent", choices=sorted(agents), required=True)
    parser.add_argument("--out", type=Path, default=None, help="folder of agent.zip and card.yml")
    kind = type(next(iter(agents.values())))
    hints = typing.get_type_hints(kind)
    fields = [f.name for f in dataclasses.fields(kind) if f.name not in ("agent", "env", "overrides")]
    for name in fields:
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=None, metavar=getattr(hints[name], "__name__", "V")
        )
    given = vars(parser.parse_args(arguments))
    config = agents[given["agent"]]
    changes = {name: _convert(given[name], hints[name]) for name in fields if given[name] is not None}
    config = dataclasses.replace(config, **changes, overrides=tuple(sorted(changes)))
    return config, given["out"] or AGENTS / config.agent


def _convert(text: str, hint: Any) -> Any:
    """``text`` as the type ``hint``: int, float, str, bool or a tuple of int."""
    if isinstance(hint, types.GenericAlias):
        return tuple(int(part) for part in text.split(","))
    if hint is bool:
        return text.lower() in ("1", "true", "yes")
    return hint(text)
