"""Reads the folder of an agent trained with rl-baselines3-zoo.

``<env>_1/<env>.zip`` (or ``best_model.zip``), ``<env>_1/<env>/config.yml``, ``args.yml`` and, where the
observation was normalised, ``vecnormalize.pkl``. The YAML files carry Python tags; only the plain data under
them is taken. ``normalize: "dict(norm_obs=True)"`` is parsed, never evaluated.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlquant.errors import InputError

__all__ = ["ZooFolder", "find_zoo_folder"]


@dataclass(frozen=True)
class ZooFolder:
    """What an rl-zoo folder says.

    Attributes:
        checkpoint: the SB3 zip.
        env_id: the id that the agent was trained on (it may have retired).
        env_kwargs: for ``gym.make``.
        wrappers: (class name, keyword arguments), innermost first.
        frame_stack: how many observations are stacked; 1 for none.
        normaliser: the ``vecnormalize.pkl``, or None where observations were not normalised.
    """

    checkpoint: Path
    env_id: str
    env_kwargs: dict[str, Any]
    wrappers: tuple[tuple[str, dict[str, Any]], ...]
    frame_stack: int
    normaliser: Path | None


def find_zoo_folder(path: Path) -> ZooFolder | None:
    """The zoo agent at ``path`` (its folder, or a zip inside it); None where there is no ``config.yml``.

    Raises:
        InputError: the folder is incomplete (no zip, or a declared normaliser is missing) or its YAML is odd.
    """
    folder = path if path.is_dir() else path.parent
    configs = sorted(folder.glob("*/config.yml"))
    if not configs:
        return None
    if len(configs) > 1:
        raise InputError(f"{folder} holds {len(configs)} agents; name one of their zips' folders")
    settings = configs[0].parent
    checkpoint = path if path.is_file() else _checkpoint(folder, settings.name)
    config = _read_ordered(configs[0])
    args = _read_ordered(settings / "args.yml") if (settings / "args.yml").is_file() else {}
    if config.get("vec_env_wrapper"):
        raise InputError(
            f"{configs[0]} asks for the vec_env_wrapper {config['vec_env_wrapper']}, which is unknown"
        )
    env_kwargs = args.get("env_kwargs") or config.get("env_kwargs") or {}
    if isinstance(env_kwargs, str):
        env_kwargs = _literal_dict(env_kwargs, "env_kwargs")
    if not isinstance(env_kwargs, dict):
        raise InputError(f"{settings}: env_kwargs must be a mapping, not {env_kwargs!r}")
    return ZooFolder(
        checkpoint=checkpoint,
        env_id=str(args.get("env") or settings.name),
        env_kwargs=env_kwargs,
        wrappers=_wrappers(config.get("env_wrapper")),
        frame_stack=_frame_stack(config.get("frame_stack"), configs[0]),
        normaliser=_normaliser(settings, config),
    )


def _checkpoint(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.zip", folder / "best_model.zip"):
        if candidate.is_file():
            return candidate
    raise InputError(f"{folder} holds no {name}.zip and no best_model.zip")


def _normaliser(settings: Path, config: dict[str, Any]) -> Path | None:
    declared = config.get("normalize")
    if isinstance(declared, str):
        declared = (
            _literal_dict(declared, "normalize")
            if "dict" in declared or "{" in declared
            else declared == "True"
        )
    if isinstance(declared, dict):
        declared = declared.get("norm_obs", True)
    if not declared:
        return None
    path = settings / "vecnormalize.pkl"
    if not path.is_file():
        raise InputError(
            f"{settings / 'config.yml'} says that observations were normalised, but {path} is missing; without "
            "it the policy sees numbers that it was never trained on. Put the file back"
        )
    return path


def _wrappers(declared: Any) -> tuple[tuple[str, dict[str, Any]], ...]:
    """``env_wrapper``: a dotted class, ``{dotted: kwargs}``, or a list of these."""
    if not declared:
        return ()
    found = []
    for item in declared if isinstance(declared, list) else [declared]:
        pairs = list(item.items()) if isinstance(item, dict) else [(item, {})]
        if len(pairs) != 1 or not isinstance(pairs[0][1] or {}, dict):
            raise InputError(
                f"env_wrapper {item!r} is neither a class nor a class with its keyword arguments"
            )
        name, kwargs = pairs[0]
        found.append((str(name).rsplit(".", 1)[-1], dict(kwargs or {})))
    return tuple(found)


def _frame_stack(declared: Any, path: Path) -> int:
    if declared is None:
        return 1
    if not isinstance(declared, int) or declared < 1:
        raise InputError(f"{path}: frame_stack must be a whole number of at least 1, not {declared!r}")
    return declared


def _read_ordered(path: Path) -> dict[str, Any]:
    """A zoo YAML: a mapping, or an ``OrderedDict`` written as a list of pairs under a Python tag."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if isinstance(loaded, list) and len(loaded) == 1:
        loaded = loaded[0]  # the argument list of OrderedDict
    if isinstance(loaded, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in loaded):
        loaded = {str(key): value for key, value in loaded}
    if not isinstance(loaded, dict):
        raise InputError(f"{path} is no rl-zoo file: expected a mapping")
    return loaded


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader that takes the plain data under any Python tag and constructs nothing."""


def _plain(loader: _PlainLoader, _suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def _literal_dict(text: str, name: str) -> dict[str, Any]:
    """``{'a': 1}`` or ``dict(a=1)``; literals only."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and getattr(tree.func, "id", "") == "dict" and not tree.args:
            return {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in tree.keywords}
        value = ast.literal_eval(tree)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{name} {text!r} is not a plain dict")
    return value
