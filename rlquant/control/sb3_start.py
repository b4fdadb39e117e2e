"""A stock Stable-Baselines3 model to train: a fresh one, or one that begins with a trained agent's weights.

Nothing in the agent's file is run: the model is built anew, and takes the tensors. Critics come along where the
file has whole ones (the shipped agents have none); optimizers, replay and SAC's entropy coefficient begin anew.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import gymnasium as gym
import torch
from pydantic import ConfigDict, Field, StrictBool
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from rlquant.config import Section
from rlquant.control.agent import Agent
from rlquant.control.environment import EnvSpec, make_env
from rlquant.control.load import card_spec, checkpoint_file, from_sb3, load
from rlquant.control.normaliser import Normaliser
from rlquant.control.sb3_acting import LAYOUTS
from rlquant.control.sb3_network import activation_class
from rlquant.control.sb3_zip import Checkpoint, read_checkpoint
from rlquant.control.slim import CRITIC_PREFIXES
from rlquant.control.trusted import sb3_class
from rlquant.errors import InputError, unknown_name

__all__ = ["AgentSettings", "SB3Settings", "Start", "find_start", "new_model"]

_OURS = ("self", "policy", "env", "seed", "device", "policy_kwargs", "verbose", "_init_setup_model")
_KEPT_KWARGS = ("log_std_init", "n_critics", "n_quantiles", "normalize_images", "share_features_extractor")
_Value = Annotated[StrictBool | int | float | str, Field(union_mode="left_to_right")]


class SB3Settings(Section):
    """Arguments of the algorithm's class in Stable-Baselines3; ``lin_0.001`` falls linearly to zero."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Value]

    def arguments(self, algorithm: str) -> dict[str, Any]:
        """As the class takes them. Raises InputError for a name that it does not know."""
        known = [name for name in inspect.signature(sb3_class(algorithm)).parameters if name not in _OURS]
        given = self.__pydantic_extra__
        for name in given:
            if name not in known:
                raise unknown_name(f"argument of {algorithm}", name, known)
        return {name: _schedule(name, value) for name, value in given.items()}


class AgentSettings(Section):
    """A trained agent."""

    shorthand: ClassVar[str] = "path"
    path: str = Field(description="a shipped agent, an SB3 .zip or an rl-zoo folder")
    normaliser: Path | None = Field(None, description="vecnormalize.pkl of a bare zip")
    frame_stack: int = Field(1, ge=1, description="observations that a bare zip sees at once")


@dataclass(frozen=True)
class Start:
    """What a training begins with.

    Attributes:
        algorithm: SB3's class name.
        env: where it trains and is scored.
        agent, checkpoint: what is fine-tuned; None from scratch.
    """

    algorithm: str
    env: EnvSpec
    agent: Agent | None = None
    checkpoint: Checkpoint | None = None


def find_start(algorithm: str | None, env: str | None, agent: AgentSettings | None) -> Start:
    """What a training begins with.

    Args:
        algorithm: in upper or lower case; None for the agent's, or PPO.
        env: an environment's id; None for the agent's.
        agent: to fine-tune; None trains from scratch.

    Raises:
        InputError: one is unknown, they do not fit each other, or there is neither an agent nor an environment.
    """
    wanted = None if algorithm is None else _algorithm(algorithm)
    if agent is None:
        if env is None:
            raise InputError(
                "there is nothing to train: name env=CartPole-v1, or agent=ppo-cartpole to fine-tune"
            )
        spec = card_spec(env)
        make_env(spec).close()
        return Start(wanted or "PPO", spec)
    zip_file = checkpoint_file(agent.path)
    loaded = load(agent.path, env=env, normaliser=agent.normaliser, frame_stack=agent.frame_stack)
    if loaded.algorithm not in LAYOUTS:
        raise InputError(
            f"{agent.path} is an agent of {loaded.algorithm}, which cannot be trained quantized; "
            f"{', '.join(LAYOUTS)} can. Distil it instead: rlquant evaluate --methods distill"
        )
    if wanted not in (None, loaded.algorithm):
        raise InputError(
            f"{agent.path} is an agent of {loaded.algorithm}, not of {wanted}: leave algorithm out"
        )
    return Start(loaded.algorithm, loaded.env, loaded, read_checkpoint(zip_file))


def new_model(
    start: Start,
    settings: SB3Settings,
    *,
    timesteps: int,
    n_envs: int = 1,
    net_arch: list[int] | None = None,
    normalise: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Any:
    """The SB3 model before its first step, with its environments.

    Args:
        start: from :func:`find_start`.
        settings: arguments of its class.
        timesteps: that it will train; a replay buffer is by default no larger.
        n_envs: environments stepped together.
        net_arch: hidden layers; None for SB3's default, or the agent's.
        normalise: observations and rewards, by running statistics. An agent's own statistics stay frozen.
        seed: of the first weights.
        device: of torch.

    Raises:
        InputError: the algorithm takes no such argument, action or observation, or the agent brings what is set.
    """
    if start.agent is not None and (net_arch is not None or normalise):
        raise InputError("net_arch and normalize are for a training from scratch; the agent brings its own")
    kind, arguments = sb3_class(start.algorithm), settings.arguments(start.algorithm)
    if "buffer_size" in inspect.signature(kind).parameters:
        arguments.setdefault("buffer_size", min(max(timesteps, 1000), 1_000_000))
    if start.checkpoint is not None:
        if start.checkpoint.data.get("use_sde"):
            arguments.setdefault("use_sde", True)
        kwargs = _policy_kwargs(start.checkpoint)
    else:
        kwargs = {} if net_arch is None else {"net_arch": net_arch}
    try:
        venv = _vec_env(start, n_envs, normalise, float(arguments.get("gamma", 0.99)))
        model = kind(
            _policy(venv.observation_space), venv, policy_kwargs=kwargs, seed=seed, device=device, **arguments
        )
    except InputError:
        raise
    except (TypeError, ValueError, AssertionError) as error:  # how SB3 says so
        raise InputError(
            f"{start.algorithm} cannot train so in {start.env.id}: {' '.join(str(error).split())}"
        ) from None
    if start.checkpoint is not None:
        _take_weights(model, start)
    return model


def _algorithm(name: str) -> str:
    by_lower = {known.lower(): known for known in LAYOUTS}
    if name.lower() not in by_lower:
        raise unknown_name("algorithm", name, by_lower)
    return by_lower[name.lower()]


def _schedule(name: str, value: Any) -> Any:
    if not (isinstance(value, str) and value.startswith("lin_")):
        return value
    try:
        return LinearSchedule(float(value.removeprefix("lin_")), 0.0, 1.0)
    except ValueError:
        raise InputError(
            f"{name} = {value!r} is no schedule: write lin_ and a number, as in lin_0.001"
        ) from None


def _policy(observation: gym.Space[Any]) -> str:
    if isinstance(observation, gym.spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation) else "MlpPolicy"


def _vec_env(start: Start, n_envs: int, normalise: bool, gamma: float) -> Any:
    """Environments in the order of the zoo's wrappers: Monitor, VecNormalize, VecFrameStack."""
    venv: Any = DummyVecEnv([lambda: Monitor(make_env(start.env))] * n_envs)
    parts = {} if start.agent is None else start.agent.parts
    part = next(iter(parts.values()), None)
    if part is not None and part.normaliser is not None:
        venv = _frozen(venv, part.normaliser)
    elif normalise:
        venv = VecNormalize(venv, gamma=gamma)
    return VecFrameStack(venv, part.stack) if part is not None and part.stack > 1 else venv


def _frozen(venv: Any, normaliser: Normaliser) -> VecNormalize:
    frozen = VecNormalize(
        venv, training=False, norm_reward=False, clip_obs=normaliser.clip, epsilon=normaliser.epsilon
    )
    statistics: Any = frozen.obs_rms
    statistics.mean, statistics.var = normaliser.mean.copy(), normaliser.var.copy()
    return frozen


def _policy_kwargs(checkpoint: Checkpoint) -> dict[str, Any]:
    """The agent's own, with a whole critic where the file has the stump of one (see ``slim``)."""
    told = checkpoint.policy_kwargs
    kwargs = {key: told[key] for key in _KEPT_KWARGS if key in told}
    if told.get("activation_fn"):
        kwargs["activation_fn"] = activation_class(told, "")
    sizes = told.get("net_arch")
    if isinstance(sizes, dict) and [1] in (sizes.get("vf"), sizes.get("qf")):
        sizes = sizes["pi"]
        kwargs.pop("n_critics", None)
    return kwargs if sizes is None else {**kwargs, "net_arch": sizes}


def _take_weights(model: Any, start: Start) -> None:
    assert start.checkpoint is not None
    assert start.agent is not None
    own, given = model.policy.state_dict(), start.checkpoint.tensors
    fits = {name for name, tensor in given.items() if name in own and own[name].shape == tensor.shape}
    if any(name.startswith(CRITIC_PREFIXES) for name in own.keys() - fits):
        fits = {name for name in fits if not name.startswith(CRITIC_PREFIXES)}
    model.policy.load_state_dict({name: given[name] for name in fits}, strict=False)
    taken, wanted = (agent.actor.state_dict() for agent in (from_sb3(model, env=start.env), start.agent))
    if taken.keys() != wanted.keys() or not all(torch.equal(taken[name], wanted[name]) for name in wanted):
        raise InputError(f"{start.agent.source} has a policy that stock {start.algorithm} cannot train on")
