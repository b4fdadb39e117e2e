"""What ``--trust`` does: load an SB3 zip through SB3 itself, which runs whatever code the file holds.

For authors whom the user trusts, and for policies that the safe reader cannot rebuild: a custom policy class or
features extractor. The policy's own modules then act, without critic and exploration noise, and are quantized
where they stand. Such an agent can be evaluated; it cannot be written as an artifact, which holds no code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlquant.control.actor import Actor
from rlquant.control.agent import Agent
from rlquant.control.environment import EnvSpec, make_env
from rlquant.control.head import Head
from rlquant.control.normaliser import Normaliser
from rlquant.control.observation import ObservationPart
from rlquant.control.sb3_zip import guess_by_fields, read_data
from rlquant.control.spaces import Space
from rlquant.errors import InputError

__all__ = ["load_with_sb3", "sb3_class", "sb3_model"]


def sb3_class(algorithm: str) -> Any:
    """The class of an algorithm, from stable_baselines3 or sb3_contrib."""
    import sb3_contrib
    import stable_baselines3

    return getattr(stable_baselines3, algorithm, None) or getattr(sb3_contrib, algorithm)


def sb3_model(path: Path, **known: Any) -> tuple[Any, str]:
    """The model of a checkpoint, loaded by SB3, and the name of its algorithm.

    Args:
        path: an SB3 zip from a trusted author: loading it runs whatever code it holds.
        known: attributes that are given, not unpickled: those of old checkpoints name modules that are gone.

    Raises:
        InputError: SB3 cannot load it.
    """
    algorithm = guess_by_fields(read_data(path))
    # Schedules that only training needs.
    plain = {"lr_schedule": 0.0, "clip_range": 0.0, "learning_rate": 0.0, **known}
    try:
        return sb3_class(algorithm).load(path, device="cpu", custom_objects=plain), algorithm
    except Exception as error:  # the file's own code may raise anything
        raise InputError(f"{path} cannot be loaded as {algorithm}, even trusted: {error}") from None


def load_with_sb3(path: Path, spec: EnvSpec, statistics: dict[str, Normaliser]) -> Agent:
    """An agent whose network is the checkpoint's own code.

    Args:
        path: an SB3 zip from a trusted author.
        spec: the environment that scores it.
        statistics: frozen normalisers by observation key.

    Raises:
        InputError: SB3 cannot load it, it has memory, or its observations are not one Box.
    """
    model, algorithm = sb3_model(path)
    env = make_env(spec)
    raw, seen = Space.from_gym(env.observation_space), Space.from_gym(model.observation_space)
    env.close()
    if raw.kind != "box" or (raw.shape != seen.shape and raw.shape[-1:] + raw.shape[:-1] != seen.shape):
        raise InputError(
            f"a trusted policy is used on one Box; it has {seen.describe()}, {spec.id} {raw.describe()}"
        )
    network = _PolicyNetwork(model.policy, algorithm)
    head = Head(network.head, Space.from_gym(model.action_space))
    part = ObservationPart(raw, statistics.get(""), transpose=raw.shape != seen.shape)
    actor = Actor({"": nn.Identity()}, network).eval().requires_grad_(False)
    agent = Agent(actor, head, {"": part}, spec, algorithm, masked=algorithm == "MaskablePPO")
    return replace(agent, source=str(path))


class _PolicyNetwork(nn.Module):
    """Head outputs of a live SB3 policy, ``[n, *shape]`` to ``[n, outputs]``, training parts removed."""

    def __init__(self, policy: Any, algorithm: str) -> None:
        super().__init__()
        if hasattr(policy, "lstm_actor"):
            raise InputError("a custom recurrent policy is not supported, even trusted")
        for owner, name in (
            (policy, "value_net"),
            (policy, "critic"),
            (policy, "critic_target"),
            (policy, "actor_target"),
        ):
            if hasattr(owner, name):
                setattr(owner, name, nn.Identity())
        for name in ("q_net_target", "quantile_net_target"):
            if hasattr(policy, name):
                setattr(policy, name, nn.Identity())
        if hasattr(policy, "mlp_extractor") and hasattr(policy.mlp_extractor, "value_net"):
            policy.mlp_extractor.value_net = nn.Identity()
        self.policy = policy
        self.algorithm = algorithm

    @property
    def head(self) -> str:
        """The head that turns the outputs into actions."""
        if self.algorithm in ("SAC", "TQC"):
            return "tanh"
        if self.algorithm in ("TD3", "DDPG"):
            return "unscale"
        kind = Space.from_gym(self.policy.action_space).kind
        return {"discrete": "argmax", "multidiscrete": "multi_argmax", "multibinary": "threshold"}.get(
            kind, "clip"
        )

    def forward(self, observations: Tensor) -> Tensor:
        """Logits, Q-values or action means."""
        policy = self.policy
        if self.algorithm == "DQN":
            outputs: Tensor = policy.q_net(observations)
        elif self.algorithm == "QRDQN":
            outputs = policy.quantile_net(observations).mean(dim=1)
        elif self.algorithm in ("SAC", "TQC"):
            outputs = policy.actor.get_action_dist_params(observations)[0]
        elif self.algorithm in ("TD3", "DDPG"):
            outputs = policy.actor(observations)
        else:
            features = policy.extract_features(observations)
            features = features[0] if isinstance(features, tuple) else features
            outputs = policy.action_net(policy.mlp_extractor.forward_actor(features))
        return outputs
