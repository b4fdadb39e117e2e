"""Loads a control policy from any source that rlquant knows: one place decides which kind it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rlquant import catalog
from rlquant.control.agent import Agent
from rlquant.control.environment import EnvSpec, resolve_env
from rlquant.control.normaliser import Normaliser, load_normaliser
from rlquant.control.observation import ObservationPart, fit_parts
from rlquant.control.sb3_network import build_network
from rlquant.control.sb3_zip import Checkpoint, read_checkpoint
from rlquant.control.spaces import Space
from rlquant.control.zoo_folder import ZooFolder, find_zoo_folder
from rlquant.errors import InputError, nearest

__all__ = ["card_spec", "checkpoint_file", "from_sb3", "load"]


def load(
    source: str | Path,
    *,
    env: str | None = None,
    normaliser: str | Path | None = None,
    frame_stack: int = 1,
    trust: bool = False,
) -> Agent:
    """Load an agent.

    Args:
        source: a catalog name, an SB3 ``.zip``, an rl-zoo agent folder, or an rlquant artifact folder.
        env: the environment's id; needed for a bare zip, and stronger than what the source says.
        normaliser: a ``vecnormalize.pkl`` for a bare zip that was trained with ``VecNormalize``.
        frame_stack: how many observations a bare zip was trained to see at once.
        trust: let SB3 and pickle load the file, which runs whatever code it holds.

    Returns:
        An agent in eval mode whose spaces fit its environment.

    Raises:
        InputError: the source is missing, of an unknown kind, damaged, refused, or fits no environment.
    """
    path = Path(source)
    if normaliser is not None and not (path.is_file() and find_zoo_folder(path) is None):
        raise InputError(f"--normaliser is for a bare SB3 .zip; {source} brings its own observation map")
    if str(source) in catalog.agents() and not path.exists():
        card = catalog.agent_card(str(source))
        folder = catalog.agent_folder(str(source))
        spec = card_spec(env or str(card["env"]))
        agent = _from_zip(folder / "agent.zip", spec, {}, int(card.get("frame_stack", 1)), trust)
        return replace(agent, source=str(source))
    if not path.exists():
        raise _missing(source)
    if (path / "policy.json").is_file():
        from rlquant.control.artifact import load_artifact

        agent = load_artifact(path)
        if env is not None and env != agent.env.id:
            raise InputError(f"the artifact {source} acts in {agent.env.id}, not in {env}; leave --env out")
        return agent
    zoo = find_zoo_folder(path)
    if zoo is not None:
        agent = _from_zoo(zoo, env, trust)
    elif path.is_file():
        statistics = load_normaliser(Path(normaliser), trust=trust) if normaliser else {}
        agent = _from_zip(path, _named(env, path), statistics, frame_stack, trust)
    else:
        raise InputError(
            f"{path} is a folder of no known kind; expected an rl-zoo agent (a zip and <env>/config.yml) or an "
            "rlquant artifact (policy.json)"
        )
    return replace(agent, source=str(source))


def from_sb3(model: Any, *, env: str | EnvSpec | None = None) -> Agent:
    """An agent from a live SB3 model, for use inside a training script.

    Args:
        model: e.g. ``PPO``, after ``learn``; its ``VecNormalize`` comes along, frozen.
        env: where to score it; by default the environment that it was trained in.

    Raises:
        InputError: the model has no environment, or a policy that is not SB3's own.
    """
    vec_env, statistics = model.get_env(), {}
    if env is None:
        spec = vec_env.get_attr("spec")[0] if vec_env is not None else None
        if spec is None:
            raise InputError("this model has no registered environment; pass env='...'")
        env = EnvSpec(spec.id, dict(spec.kwargs))
    normalise = model.get_vec_normalize_env()
    if normalise is not None and normalise.norm_obs:
        parts = normalise.obs_rms if isinstance(normalise.obs_rms, dict) else {"": normalise.obs_rms}
        statistics = {
            key: Normaliser(rms.mean.copy(), rms.var.copy(), normalise.epsilon, normalise.clip_obs)
            for key, rms in parts.items()
        }
    return _assemble(
        type(model).__name__,
        {name: tensor.cpu() for name, tensor in model.policy.state_dict().items()},
        _plain_kwargs(model),
        (Space.from_gym(model.observation_space), Space.from_gym(model.action_space)),
        EnvSpec(env) if isinstance(env, str) else env,
        statistics,
        stack=getattr(_find_stack(vec_env), "n_stack", 1),
    )


def _plain_kwargs(model: Any) -> dict[str, Any]:
    """``policy_kwargs`` as a checkpoint's JSON tells them: classes by name."""
    kwargs = {
        key: str(value) if isinstance(value, type) else value for key, value in model.policy_kwargs.items()
    }
    if type(model).__name__ == "ARS":
        kwargs["squash_output"] = model.policy.squash_output
    return kwargs


def _find_stack(vec_env: Any) -> Any:
    """The ``StackedObservations`` of a chain of vector environments, or None."""
    while vec_env is not None:
        if hasattr(vec_env, "stacked_obs"):
            return vec_env.stacked_obs
        vec_env = getattr(vec_env, "venv", None)
    return None


def _missing(source: str | Path) -> InputError:
    close = nearest(str(source), catalog.agents())
    hint = f" Did you mean the shipped agent {close!r}?" if close else ""
    return InputError(
        f"{source} does not exist.{hint} A source is a shipped agent ({', '.join(catalog.agents())}), an SB3 "
        ".zip, an rl-zoo agent folder or an rlquant artifact folder"
    )


def checkpoint_file(source: str | Path) -> Path:
    """The SB3 zip of a source that :func:`load` knows. Raises InputError for an artifact, which has none."""
    path = Path(source)
    if str(source) in catalog.agents() and not path.exists():
        return catalog.agent_folder(str(source)) / "agent.zip"
    if not path.exists():
        raise _missing(source)
    zoo = find_zoo_folder(path)
    if zoo is None and not path.is_file():
        raise InputError(
            f"{source} is no Stable-Baselines3 checkpoint: name a shipped agent, a .zip or an rl-zoo folder"
        )
    return zoo.checkpoint if zoo else path


def card_spec(env_id: str) -> EnvSpec:
    """The environment as its card describes it; just the id where there is none."""
    card = catalog.env_card(env_id)
    return EnvSpec(card["make"]["id"], dict(card["make"]["kwargs"])) if card else EnvSpec(env_id)


def _named(env: str | None, path: Path) -> EnvSpec:
    if env is None:
        raise InputError(
            f"{path} does not say which environment it was trained in; name it: --env CartPole-v1"
        )
    return card_spec(env)


def _from_zoo(zoo: ZooFolder, env: str | None, trust: bool) -> Agent:
    spec = EnvSpec(env or zoo.env_id, zoo.env_kwargs, zoo.wrappers)
    statistics = load_normaliser(zoo.normaliser, trust=trust) if zoo.normaliser else {}
    return _from_zip(zoo.checkpoint, spec, statistics, zoo.frame_stack, trust)


def _from_zip(path: Path, spec: EnvSpec, statistics: dict[str, Normaliser], stack: int, trust: bool) -> Agent:
    try:
        return _from_checkpoint(read_checkpoint(path, trust=trust), spec, statistics, stack)
    except InputError:
        if not trust:
            raise
    from rlquant.control.trusted import load_with_sb3

    return load_with_sb3(path, spec, statistics)


def _from_checkpoint(
    checkpoint: Checkpoint, spec: EnvSpec, statistics: dict[str, Normaliser], stack: int
) -> Agent:
    agent = _assemble(
        checkpoint.algorithm,
        checkpoint.tensors,
        checkpoint.policy_kwargs,
        (checkpoint.observation_space, checkpoint.action_space),
        spec,
        statistics,
        stack,
    )
    return replace(agent, source=str(checkpoint.path), sha256=checkpoint.sha256)


def _assemble(
    algorithm: str,
    tensors: dict[str, Any],
    policy_kwargs: dict[str, Any],
    spaces: tuple[Space, Space],
    spec: EnvSpec,
    statistics: dict[str, Normaliser],
    stack: int,
) -> Agent:
    observation, action = spaces
    scale_images = policy_kwargs.get("normalize_images", True) is not False
    found: dict[str, Any] = {}

    def fits(env: gym.Env) -> bool:
        raw, acts = Space.from_gym(env.observation_space), Space.from_gym(env.action_space)
        parts = fit_parts(raw, observation, stack=stack, scale_images=scale_images)
        if parts is None or (acts.kind, acts.shape, acts.sizes) != (action.kind, action.shape, action.sizes):
            return False
        found.update(parts=parts, action=acts)
        return True

    spec = resolve_env(spec, fits)
    # The bounds that were trained with; the environment's where the checkpoint's print was shortened.
    action = found["action"] if action.kind == "box" and action.low is None else action
    network_space = replace(observation, spaces=_network_parts(observation, found["parts"]))
    actor, head = build_network(algorithm, tensors, policy_kwargs, network_space, action)
    if ("FlattenGoal", {}) in spec.wrappers and "desired_goal" in statistics:
        statistics = {"": _flatten_goal(statistics)}
    parts = _with_statistics(found["parts"], statistics)
    return Agent(actor, head, parts, spec, algorithm, masked=algorithm == "MaskablePPO")


def _network_parts(observation: Space, parts: dict[str, ObservationPart]) -> dict[str, Space]:
    return {key: observation.spaces[key] for key in parts} if observation.kind == "dict" else {}


def _flatten_goal(statistics: dict[str, Normaliser]) -> Normaliser:
    """Statistics of the parts that :class:`~rlquant.control.environment.FlattenGoal` concatenates."""
    seen, goal = statistics["observation"], statistics["desired_goal"]
    mean, var = np.concatenate([seen.mean, goal.mean]), np.concatenate([seen.var, goal.var])
    return Normaliser(mean, var, seen.epsilon, seen.clip)


def _with_statistics(
    parts: dict[str, ObservationPart], statistics: dict[str, Normaliser]
) -> dict[str, ObservationPart]:
    fitted = dict(parts)
    for key, normaliser in statistics.items():
        if key not in parts:
            raise InputError(
                f"the normaliser has statistics for {key!r}; the observation has {', '.join(parts)}"
            )
        if normaliser.mean.shape != parts[key].space.shape:
            raise InputError(
                f"the normaliser covers observations of shape {list(normaliser.mean.shape)}; the environment's "
                f"have {list(parts[key].space.shape)}"
            )
        fitted[key] = replace(parts[key], normaliser=normaliser)
    return fitted
