"""A trained agent without what only training needs.

A Stable-Baselines3 zip carries critics, target networks, optimizer moments and episode buffers: for SAC on
HalfCheetah 3.3 MB, of which the deployable actor is 0.3 MB. :func:`save_actor` writes a zip that holds the
actor alone and that stock Stable-Baselines3 still loads. It loads because nothing is left out of the format:
the critic becomes one hidden unit (``net_arch``), target networks share the storage of the network that they
follow, and the optimizer states are empty.
"""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from rlquant.errors import InputError

__all__ = ["CRITIC_PREFIXES", "save_actor"]

CRITIC_PREFIXES = (
    "vf_features_extractor.",
    "mlp_extractor.value_net.",
    "value_net.",
    "lstm_critic.",
    "critic.",
    "critic_target.",
)
_TARGETS = {
    "q_net_target": "q_net",
    "quantile_net_target": "quantile_net",
    "actor_target": "actor",
    "critic_target": "critic",
}
# Rebuilt by the loader from plain numbers; pickled, they would tie the zip to one Python version.
_REBUILT_BY_LOADER = ("lr_schedule", "exploration_schedule")
_TRAINING_STATE = (
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
    "ep_info_buffer",
    "ep_success_buffer",
)


def save_actor(model: BaseAlgorithm, path: str | Path) -> Path:
    """Write the deployable actor of a Stable-Baselines3 or sb3-contrib ``model`` to ``path``.

    The zip loads with ``type(model).load(path)``, and its deterministic actions equal the model's bit for bit.
    The same model gives the same bytes, whenever it is saved.
    It is made for acting: training cannot resume from it, since critics and optimizer states are gone.
    An observation normaliser (``VecNormalize``) is a file of its own in Stable-Baselines3: save it beside the zip.

    Args:
        model: a trained algorithm of Stable-Baselines3 (A2C, PPO, DQN, DDPG, TD3, SAC) or sb3-contrib (ARS,
            CrossQ, MaskablePPO, QRDQN, RecurrentPPO, TQC, TRPO). It is left as it was.
        path: the file to write; written to a temporary name first, then moved into place.

    Returns:
        The path written.

    Raises:
        InputError: the policy holds actor parameters that a policy rebuilt from its ``policy_kwargs`` lacks.
        OSError: the folder cannot be written.
    """
    path = Path(path)
    slim = _rebuild(model)
    _copy_actor(model.policy, slim.policy)
    _share_targets(slim.policy)
    saved = io.BytesIO()
    slim.save(saved, exclude=_REBUILT_BY_LOADER)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(_repack(saved))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _rebuild(model: BaseAlgorithm) -> BaseAlgorithm:
    """The same algorithm with an untrained policy of the same actor, the smallest critic, and no memory."""
    excluded = {*model._excluded_save_params(), *_REBUILT_BY_LOADER}
    settings = {name: value for name, value in vars(model).items() if name not in excluded}
    settings |= dict.fromkeys(_TRAINING_STATE)
    settings |= {
        "policy_kwargs": _smallest_critic(model),
        "learning_rate": float(model.lr_schedule(1.0))
        if hasattr(model, "lr_schedule")
        else model.learning_rate,
        "n_envs": 1,
        "seed": None,  # a seed would reset the global generators of whoever loads the zip
        "tensorboard_log": None,
        "action_noise": None,
        "start_time": 0.0,
        "verbose": 0,
    }
    if "buffer_size" in settings:
        settings["buffer_size"] = 1  # the loader allocates the replay buffer
    slim = type(model)(model.policy_class, env=None, device="cpu", _init_setup_model=False)  # type: ignore[call-arg]
    vars(slim).update(settings)
    slim._setup_model()
    for name in ("clip_range", "clip_range_vf"):
        schedule = getattr(model, name, None)
        if schedule is not None:
            setattr(slim, name, float(schedule(1.0)) if callable(schedule) else schedule)
    return slim


def _smallest_critic(model: BaseAlgorithm) -> dict[str, Any]:
    """The model's ``policy_kwargs`` with every critic reduced to one unit."""
    kwargs = dict(model.policy_kwargs or {})
    policy = model.policy
    if isinstance(policy, ActorCriticPolicy):
        kwargs |= {
            "net_arch": {"pi": _layers(policy.net_arch, "pi"), "vf": [1]},
            "share_features_extractor": True,
        }
        if hasattr(policy, "lstm_actor"):
            kwargs |= {"shared_lstm": True, "enable_critic_lstm": False}
    elif hasattr(policy, "critic"):
        kwargs |= {
            "net_arch": {"pi": _layers(policy.net_arch, "pi"), "qf": [1]},
            "share_features_extractor": True,
        }
        if "n_critics" in kwargs:
            kwargs["n_critics"] = 1
    return kwargs


def _layers(net_arch: Any, head: str) -> list[int]:
    """Hidden sizes of ``head`` in a ``net_arch``: a list for all heads, or a dict of lists by head."""
    return list(net_arch[head] if isinstance(net_arch, dict) else net_arch)


def _copy_actor(source: nn.Module, target: nn.Module) -> None:
    """Copy every tensor of the actor from ``source`` to ``target``; zero the critics of ``target``."""
    for name, parameter in target.named_parameters():
        if name.startswith(CRITIC_PREFIXES):
            parameter.data.zero_()
    state, trained = target.state_dict(), source.state_dict()
    for name, tensor in state.items():
        if name.startswith(CRITIC_PREFIXES):
            continue
        if name not in trained or trained[name].shape != tensor.shape:
            raise InputError(
                f"cannot separate the actor of {type(source).__name__}: its tensor {name!r} does not fit a policy "
                "rebuilt from policy_kwargs; save the whole model with model.save(path) instead"
            )
        tensor.copy_(trained[name])


def _share_targets(policy: nn.Module) -> None:
    """Let each target network use the storage of the network that it follows: the zip then holds it once."""
    for target_name, source_name in _TARGETS.items():
        target, source = getattr(policy, target_name, None), getattr(policy, source_name, None)
        if target is None or source is None:
            continue
        for (_, own), (_, followed) in zip(_tensors(target), _tensors(source), strict=True):
            own.data = followed.data


def _repack(saved: io.BytesIO) -> bytes:
    """The zip compressed, without clock times and without the description of the machine it was saved on."""
    packed = io.BytesIO()
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            if name != "system_info.txt":
                target.writestr(zipfile.ZipInfo(name), source.read(name), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _tensors(module: nn.Module) -> list[tuple[str, Any]]:
    return [*module.named_parameters(), *module.named_buffers()]
