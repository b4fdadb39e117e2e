"""Finds what rlquant ships - agents, environment cards and recipes - by name.

``agents/``, ``envs/`` and ``recipes/`` are data, not packages: nothing imports them. In a wheel they lie under
``rlquant/_data/``; in an editable install they are the sibling folders of the package, used only where the
adjacent ``pyproject.toml`` says ``name = "rlquant"``, so that a stranger's ``agents/`` is never taken for ours.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rlquant.errors import InputError, unknown_name

__all__ = [
    "agent_card",
    "agent_folder",
    "agents",
    "data_root",
    "env_card",
    "env_module",
    "envs",
    "module_of",
    "recipe_configs",
    "recipe_file",
    "recipes",
    "register_env",
]


@cache
def data_root() -> Path:
    """The folder that holds ``agents/``, ``envs/`` and ``recipes/``."""
    package = Path(__file__).resolve().parent
    installed = package / "_data"
    if installed.is_dir():
        return installed
    project = package.parent / "pyproject.toml"
    if project.is_file() and 'name = "rlquant"' in project.read_text(encoding="utf-8"):
        return package.parent
    raise InputError(
        f"the shipped agents and environments are missing beside {package}; reinstall with: pip install rlquant"
    )


def agents() -> list[str]:
    """Names of the shipped agents, sorted."""
    return sorted(card.parent.name for card in (data_root() / "agents").glob("*/card.yml"))


def agent_folder(name: str) -> Path:
    """The folder of a shipped agent: ``agent.zip`` and ``card.yml``."""
    if name not in agents():
        raise unknown_name("agent", name, agents())
    return data_root() / "agents" / name


def agent_card(name: str) -> dict[str, Any]:
    """The card of a shipped agent: algorithm, hyper-parameters, seed, score, sha256."""
    return _read_yaml(agent_folder(name) / "card.yml")


def envs() -> list[str]:
    """Ids of the environments that have a card, sorted."""
    return sorted(path.stem for path in (data_root() / "envs").glob("*.yml"))


def env_card(env_id: str) -> dict[str, Any] | None:
    """The card of an environment (make-kwargs, control rate, random score), or None where there is none."""
    path = data_root() / "envs" / f"{env_id}.yml"
    return _read_yaml(path) if env_id in envs() else None


def recipes() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in (data_root() / "recipes").glob("*.py"))


def recipe_file(name: str) -> Path:
    """The script of a shipped recipe."""
    if name not in recipes():
        raise unknown_name("recipe", name, recipes())
    return data_root() / "recipes" / f"{name}.py"


def recipe_configs() -> dict[str, Path]:
    """The shipped YAML files with settings of recipes, by name, sorted."""
    return {path.stem: path for path in sorted((data_root() / "recipes").glob("*.yml"))}


@cache
def env_module(name: str) -> ModuleType:
    """What executing the single file ``envs/<name>`` defines."""
    return module_of(data_root() / "envs" / name, "envs")


def module_of(path: Path, kind: str) -> ModuleType:
    """What executing a single Python file defines. Raises InputError where it is no file to execute."""
    name = f"rlquant_{kind}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"the file {path} cannot be loaded: it is no Python file")
    module = importlib.util.module_from_spec(spec)
    # gymnasium and pydantic name a class by its module, and worker processes and wrappers look it up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def register_env(env_id: str) -> None:
    """Register a custom environment of ours with gymnasium, by running its single file; others need nothing."""
    card = env_card(env_id)
    if card is not None and card.get("module"):
        env_module(card["module"])


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        raise InputError(f"{path} is not a card: expected a YAML mapping")
    return loaded
