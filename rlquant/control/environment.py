"""The environment that scores a policy: made by id, wrapped as in training, found under its present name.

Ids retire (``LunarLander-v2``); their successors often keep observation and action spaces. A retired id is
mapped to the newest registered version whose spaces fit the agent, so that old checkpoints keep running and a
changed observation is never fed to a network that was not trained on it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np

from rlquant import catalog
from rlquant.control.spaces import Space
from rlquant.errors import InputError, missing_package, unknown_name

__all__ = ["WRAPPERS", "EnvSpec", "make_env", "random_scores", "resolve_env"]


@dataclass(frozen=True)
class EnvSpec:
    """How to make an environment.

    Attributes:
        id: gymnasium id as registered now.
        kwargs: for ``gym.make``.
        wrappers: (name in :data:`WRAPPERS`, keyword arguments), applied in order.
        requested: the id that was asked for, where it is a retired one.
    """

    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[tuple[str, dict[str, Any]], ...] = ()
    requested: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as an artifact stores it."""
        return {"id": self.id, "kwargs": self.kwargs, "wrappers": [list(w) for w in self.wrappers]}

    @classmethod
    def from_json(cls, doc: dict[str, Any]) -> EnvSpec:
        """The inverse of :meth:`to_json`."""
        return cls(doc["id"], doc["kwargs"], tuple((name, kwargs) for name, kwargs in doc["wrappers"]))


def make_env(spec: EnvSpec) -> gym.Env:
    """One environment, wrapped, without gymnasium's per-step checks (they cost more than a CartPole step).

    Raises:
        InputError: the id is unknown (nearest suggested), a package is missing, or a wrapper is unknown.
    """
    _register_ours(spec.id)
    if spec.id not in gym.registry:
        raise unknown_name("environment", spec.id, _choices_near(spec.id))
    try:
        with _quiet(spec.id):
            env = gym.make(spec.id, disable_env_checker=True, **spec.kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        if "moved" in str(error):
            raise InputError(f"the environment {spec.id} has retired") from None
        raise missing_package(_missing_name(error), "mujoco", f"the environment {spec.id}") from None
    except gym.error.Error as error:
        raise InputError(f"the environment {spec.id} cannot be made: {error}") from None
    except TypeError as error:
        raise InputError(f"the environment {spec.id} does not take {spec.kwargs}: {error}") from None
    for name, kwargs in spec.wrappers:
        env = _wrapper(name)(env, **kwargs)
    return env


def resolve_env(requested: EnvSpec, fits: Callable[[gym.Env], bool]) -> EnvSpec:
    """The registered environment for one whose id may have retired.

    Args:
        requested: as the agent's files name it, e.g. ``HalfCheetah-v3``.
        fits: whether a made environment's spaces fit the agent.

    Raises:
        InputError: no registered version fits, none can be made, or the id is unknown.
    """
    problems: list[str] = []
    for env_id, variant in _versions(requested.id):
        spec = replace(
            requested,
            id=env_id,
            kwargs={**variant, **requested.kwargs},
            requested=None if env_id == requested.id else requested.id,
        )
        for candidate in (spec, replace(spec, wrappers=(*spec.wrappers, ("FlattenGoal", {})))):
            try:
                env = make_env(candidate)
            except InputError as error:
                problems.append(str(error))
                break
            if fits(env):
                env.close()
                return candidate
            problems.append(f"{env_id} has {_describe_spaces(env)}")
            env.close()
            if not _has_goal(env):
                break
    if not problems:
        raise unknown_name("environment", requested.id, _choices_near(requested.id))
    if len(problems) == 1 and " has " not in problems[0]:
        raise InputError(problems[0])
    raise InputError(f"no version of {requested.id} fits this agent's spaces: {'; '.join(problems)}")


def random_scores(spec: EnvSpec, episodes: int, seed: int) -> np.ndarray:
    """Returns ``[episodes]`` of uniformly random actions, the zero of the retention scale."""
    env = make_env(spec)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        env.action_space.seed(seed + episode)
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += float(reward)
            done = terminated or truncated
    env.close()
    return returns


def _versions(requested: str) -> list[tuple[str, dict[str, Any]]]:
    """The id itself first, then its other versions, newest first, and variants known to keep old spaces."""
    _register_ours(requested)
    name = re.sub(r"-v\d+$", "", requested)
    versions = {spec.version: key for key, spec in gym.registry.items() if re.sub(r"-v\d+$", "", key) == name}
    newest_first = [versions[v] for v in sorted(versions, key=lambda v: -1 if v is None else v, reverse=True)]
    ids = sorted(newest_first, key=lambda env_id: env_id != requested)  # a stable sort
    found: list[tuple[str, dict[str, Any]]] = [(env_id, {}) for env_id in ids]
    if "Ant-v4" in ids:  # Ant-v2 and v3 observed contact forces
        found.append(("Ant-v4", {"use_contact_forces": True}))
    return found


def _has_goal(env: gym.Env) -> bool:
    return (
        isinstance(env.observation_space, gym.spaces.Dict) and "desired_goal" in env.observation_space.spaces
    )


def _describe_spaces(env: gym.Env) -> str:
    seen, taken = (Space.from_gym(space).describe() for space in (env.observation_space, env.action_space))
    return f"observations {seen} and actions {taken}"


@contextmanager
def _quiet(env_id: str = "") -> Iterator[None]:
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


def _register_ours(env_id: str) -> None:
    """Make sure that ids outside gymnasium's own are registered: our custom ones, robotics, Atari."""
    catalog.register_env(env_id)
    name = env_id.rsplit("-v", 1)[0]
    if name.startswith(("Fetch", "Hand", "Adroit", "FrankaKitchen", "PointMaze", "AntMaze")):
        _register_robotics()
    if name.startswith("ALE/") or "NoFrameskip" in name:
        _register_package("ale_py", "ale-py", env_id)


def _register_package(module: str, package: str, env_id: str) -> None:
    try:
        gym.register_envs(__import__(module))
    except ImportError:
        raise InputError(
            f"the environment {env_id} needs the package {package}: pip install {package}"
        ) from None


def _register_robotics() -> None:
    try:
        with _quiet():
            import gymnasium_robotics
            from gymnasium_robotics.utils import mujoco_utils
    except ImportError:
        raise missing_package("gymnasium-robotics", "mujoco", "a robotics environment") from None
    gym.register_envs(gymnasium_robotics)
    _use_integer_joint_types(mujoco_utils)


def _use_integer_joint_types(mujoco_utils: Any) -> None:
    """Let gymnasium-robotics 1.4.2 run on MuJoCo 3.9 and later.

    It tests ``joint_type in (mjtJoint.mjJNT_HINGE, ...)`` with an integer that MuJoCo's newer enums no longer
    equal, and stops with an AssertionError on every robot.
    """
    import types

    import mujoco

    if not isinstance(mujoco_utils.mujoco, types.ModuleType) or hasattr(mujoco_utils.mujoco, "rlquant_proxy"):
        return

    class Proxy(types.ModuleType):
        rlquant_proxy = True

        def __getattr__(self, name: str) -> Any:
            return getattr(mujoco, name)

    proxy = Proxy("mujoco")
    joints = {n: int(getattr(mujoco.mjtJoint, n)) for n in dir(mujoco.mjtJoint) if n.startswith("mjJNT")}
    proxy.mjtJoint = types.SimpleNamespace(**joints)  # type: ignore[attr-defined]
    mujoco_utils.mujoco = proxy


class FlattenGoal(gym.ObservationWrapper):
    """``concat(observation, desired_goal)``: what SB3's HER before 1.1 fed to its policies (``ObsDictWrapper``)."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        parts = [env.observation_space[key] for key in ("observation", "desired_goal")]  # type: ignore[index]
        low, high = (np.concatenate([getattr(part, bound) for part in parts]) for bound in ("low", "high"))
        self.observation_space = gym.spaces.Box(low, high, dtype=parts[0].dtype)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """``[observation + goal]``."""
        return np.concatenate([observation["observation"], observation["desired_goal"]])


def _time_feature(env: gym.Env, **kwargs: Any) -> gym.Env:
    from sb3_contrib.common.wrappers import TimeFeatureWrapper

    return TimeFeatureWrapper(env, **kwargs)


def _atari(env: gym.Env, **kwargs: Any) -> gym.Env:
    from stable_baselines3.common.atari_wrappers import AtariWrapper

    # A score is the game's own: whole games, unclipped points.
    return AtariWrapper(env, **{**kwargs, "terminal_on_life_loss": False, "clip_reward": False})


def _flatten(env: gym.Env) -> gym.Env:
    return gym.wrappers.FlattenObservation(env)


WRAPPERS: dict[str, Callable[..., gym.Env]] = {
    "TimeFeatureWrapper": _time_feature,
    "AtariWrapper": _atari,
    "FlattenObservation": _flatten,
    "FlattenGoal": FlattenGoal,
}


def _wrapper(name: str) -> Callable[..., gym.Env]:
    if name not in WRAPPERS:
        raise unknown_name("environment wrapper", name, WRAPPERS)
    return WRAPPERS[name]


def _choices_near(env_id: str) -> list[str]:
    """A readable list: our cards, and the registered ids that begin alike."""
    alike = [known for known in gym.registry if known.lower()[:4] == env_id.lower()[:4]]
    return sorted({*catalog.envs(), *alike})


def _missing_name(error: Exception) -> str:
    found = re.search(r"No module named '([\w.]+)'|pip install ['\"]?gymnasium\[([\w-]+)\]", str(error))
    return next((group for group in found.groups() if group), "mujoco") if found else "mujoco"
