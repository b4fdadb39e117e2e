"""Environment ids: which package brings them, which successors a retired one has."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym

from rlquant import catalog
from rlquant.errors import InputError, missing_package, nearest

__all__ = ["quiet", "register", "registered", "unknown_env", "versions"]

# What an id must match, the module that registers it, and the package to install.
_PACKAGES = (
    (r"(Fetch|Hand|Adroit|FrankaKitchen|PointMaze|AntMaze)", "gymnasium_robotics", "gymnasium-robotics"),
    (r"ALE/|.*NoFrameskip", "ale_py", "ale-py"),
    (r".*Bullet", "pybullet_envs_gymnasium", "pybullet_envs_gymnasium"),
    (r"Panda", "panda_gym", "panda-gym"),
    (r"(MiniGrid|BabyAI)", "minigrid", "minigrid"),
    (r"(highway|parking|merge|roundabout|intersection|racetrack)", "highway_env", "highway-env"),
)


def register(env_id: str) -> None:
    """Make sure that an id outside gymnasium's own is registered, where its package is installed.

    ``module:Id-v0`` imports the module, as ``gym.make`` does.

    Raises:
        InputError: the package that brings the id is not installed.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        _import(module, module, env_id)
        return
    catalog.register_env(env_id)
    for pattern, found, package in _PACKAGES:
        if re.match(pattern, name) and not registered(name):
            _import(found, package, env_id)


def registered(env_id: str) -> bool:
    """Whether gymnasium knows the id now."""
    return env_id.rpartition(":")[2] in gym.registry


def unknown_env(env_id: str) -> InputError:
    """An error that suggests the nearest id and lists our cards and the ids that begin alike."""
    alike = [known for known in gym.registry if known.lower()[:4] == env_id.lower()[:4]]
    choices = sorted({*catalog.envs(), *alike})
    close = nearest(env_id, choices)
    hint = f" Did you mean {close!r}?" if close else ""
    return InputError(
        f"unknown environment {env_id!r}.{hint} Choices: {', '.join(choices)}; one of another package is named "
        "as module:Id-v0"
    )


def versions(requested: str) -> list[tuple[str, dict[str, Any], tuple[tuple[str, dict[str, Any]], ...]]]:
    """Candidates for an id that may have retired: (id, keyword arguments, wrappers).

    The id itself comes first, then the newer versions of its name, newest first, then variants that are known
    to keep the observation of a retired version.
    """
    register(requested)
    if registered(requested) or ":" in requested:
        found: list[Any] = [(requested, {}, ())]
    else:
        found = []
    match = re.fullmatch(r"(?P<name>.+)-v(?P<version>\d+)", requested)
    if match is None:
        return found
    name, version = match["name"], int(match["version"])
    masked: tuple[tuple[str, dict[str, Any]], ...] = ()
    if "NoVel" in name and not registered(requested):  # rl-zoo registers these at import
        name, masked = name.replace("NoVel", ""), (("MaskVelocityWrapper", {}),)
        version -= 1  # the same version of the base environment will do
    numbers = [
        spec.version for spec in gym.registry.values() if spec.name == name and spec.version is not None
    ]
    newer = sorted((n for n in set(numbers) if n > version), reverse=True)
    found += [(f"{name}-v{n}", {}, masked) for n in newer]
    if name == "Ant" and version < 4:
        found.append(("Ant-v4", {"use_contact_forces": True}, (("ZeroContactForces", {}),)))
    return found


@contextmanager
def quiet(env_id: str = "") -> Iterator[None]:
    """Keep notices about other versions and model files, which a user cannot act on, off the terminal."""
    made_by = str(getattr(gym.registry.get(env_id), "entry_point", ""))
    mujoco: Any = importlib.import_module("mujoco") if "mujoco" in made_by else sys.modules.get("mujoco")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        if mujoco is not None:
            mujoco.set_mju_user_warning(lambda _message: None)
        try:
            yield
        finally:
            if mujoco is not None:
                mujoco.set_mju_user_warning(None)


def _import(module: str, package: str, env_id: str) -> None:
    try:
        with quiet():
            gym.register_envs(importlib.import_module(module))
            if module == "gymnasium_robotics":
                _use_integer_joint_types(importlib.import_module("gymnasium_robotics.utils.mujoco_utils"))
    except ImportError:
        if module == "gymnasium_robotics":
            raise missing_package(package, "mujoco", f"the environment {env_id}") from None
        raise InputError(
            f"the environment {env_id} needs the package {package}: pip install {package}"
        ) from None


def _use_integer_joint_types(mujoco_utils: Any) -> None:
    """Let gymnasium-robotics 1.4.2 run on MuJoCo 3.9 and later.

    It tests ``joint_type in (mjtJoint.mjJNT_HINGE, ...)`` with an integer that MuJoCo's newer enums no longer
    equal, and stops with an AssertionError on every robot.
    """
    import mujoco

    class Proxy(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(mujoco, name)

    proxy = Proxy("mujoco")
    joints = {n: int(getattr(mujoco.mjtJoint, n)) for n in dir(mujoco.mjtJoint) if n.startswith("mjJNT")}
    proxy.mjtJoint = types.SimpleNamespace(**joints)  # type: ignore[attr-defined]
    mujoco_utils.mujoco = proxy
