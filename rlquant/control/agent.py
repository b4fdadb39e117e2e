"""A control policy with everything that it needs to act."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rlquant.control.actor import Actor
from rlquant.control.environment import EnvSpec, make_env
from rlquant.control.head import Head
from rlquant.control.normaliser import Normaliser
from rlquant.control.observation import ObservationPart
from rlquant.control.spaces import Space
from rlquant.errors import InputError

__all__ = ["Agent"]


@dataclass
class Agent:
    """A deployable control policy. It never travels without its normaliser.

    Attributes:
        actor: the network; see :class:`~rlquant.control.actor.Actor` for its call.
        head: from network outputs to actions.
        parts: from observations to network inputs, by observation key.
        env: what scores it.
        algorithm: what trained it, e.g. ``PPO``; ``custom`` for plain torch.
        source: where it came from, for reports.
        sha256: of the checkpoint; empty where there was no file.
        masked: choices can be forbidden by the environment's ``action_masks()``.
        precision, method: what it was quantized to and how.
        parameters: how many numbers the fp32 network has.
        origin: of an artifact: source and sha256 of the agent that it was made from.
    """

    actor: Actor
    head: Head
    parts: dict[str, ObservationPart]
    env: EnvSpec
    algorithm: str
    source: str = ""
    sha256: str = ""
    masked: bool = False
    precision: str = "fp32"
    method: str = ""
    parameters: int = 0
    origin: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.parameters:
            self.parameters = sum(parameter.numel() for parameter in self.actor.parameters())

    @property
    def values_actions(self) -> bool:
        """Whether the outputs are Q-values, so that the gap between the best two has a meaning."""
        return self.algorithm in ("DQN", "QRDQN")

    def with_actor(self, actor: Actor, precision: str, method: str) -> Agent:
        """The same agent acting through another network."""
        return replace(self, actor=actor, precision=precision, method=method)

    def act(self, observation: Any) -> np.ndarray:
        """The deterministic action for one observation of an agent without memory.

        Args:
            observation: one observation as the environment shows it (a dict for a Dict space).

        Returns:
            int64 scalar or ``[branches]``, or float32 ``[*shape]``.

        Raises:
            InputError: the agent has memory (an LSTM or stacked frames); use a
                :class:`~rlquant.control.session.Session`, which keeps it.
        """
        from rlquant.control.session import Session, batch_of_one

        if self.actor.rnn is not None or any(part.stack > 1 for part in self.parts.values()):
            raise InputError("this agent has memory; act through rlquant.control.Session(agent, rows=1)")
        action: np.ndarray = Session(self, rows=1, tile=1).act(batch_of_one(observation), np.ones(1, bool))[0]
        return action

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """Actions as SB3's ``predict`` returns them, so that ``evaluate_policy(agent, env)`` works.

        Give it what the environment shows: the agent brings its own normaliser and frame stack.

        Args:
            observation: one observation, or a batch ``[n, *shape]`` (a dict of them by key).
            state: what the last call returned; None at the beginning.
            episode_start: bool ``[n]``: where an episode begins; its memory is cleared.
            deterministic: must be True; what is deployed does not explore.

        Returns:
            The action or actions, and the state for the next call.

        Raises:
            InputError: ``deterministic`` is False.
        """
        from rlquant.control.session import Session, batch_of_one

        if not deterministic:
            raise InputError("a deployed agent acts deterministically; call predict(..., deterministic=True)")
        key, part = next(iter(self.parts.items()))
        shown = np.asarray(observation[key] if isinstance(observation, dict) else observation)
        single = shown.ndim == len(part.space.shape)
        batch = batch_of_one(observation) if single else observation
        rows = 1 if single else len(shown)
        session = state if isinstance(state, Session) else Session(self, rows, tile=rows)
        if episode_start is None or session is not state:
            episode_start = np.full(rows, session is not state)
        actions = session.act(batch, np.asarray(episode_start, bool))
        return (actions[0] if single else actions), session

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        env: str | EnvSpec,
        head: str | None = None,
        normaliser: Normaliser | None = None,
        frame_stack: int = 1,
        scale_images: bool = True,
        algorithm: str = "custom",
    ) -> Agent:
        """An agent from any torch module, for users of CleanRL, TorchRL or plain torch.

        Args:
            module: maps float32 observations ``[n, *shape]`` to logits or Q-values ``[n, actions]``, or to
                action means ``[n, action_dim]``. It is used as it is, in eval mode.
            env: a gymnasium id, or a spec with wrappers.
            head: one of :data:`~rlquant.control.head.HEADS`; by default argmax for Discrete actions, per
                branch for MultiDiscrete, a threshold for MultiBinary and a clip for Box.
            normaliser: the frozen observation statistics that it was trained with.
            frame_stack: how many observations are stacked along channels (images) or the last axis.
            scale_images: divide uint8 images by 255 and move channels first.
            algorithm: a name for reports.

        Raises:
            InputError: the module does not take the observations or does not fit the actions.
        """
        spec = EnvSpec(env) if isinstance(env, str) else env
        world = make_env(spec)
        observation, action = (
            Space.from_gym(space) for space in (world.observation_space, world.action_space)
        )
        world.close()
        parts = _natural_parts(observation, frame_stack, scale_images, normaliser)
        kinds = {"discrete": "argmax", "multidiscrete": "multi_argmax", "multibinary": "threshold"}
        head_ = Head(head or kinds.get(action.kind, "clip"), action)
        trunk = nn.Sequential(*_flat(module)) if isinstance(module, nn.Sequential) else module
        actor = Actor({"": nn.Identity()}, trunk.eval())
        _try(actor, parts, head_)
        return cls(actor, head_, parts, spec, algorithm, source=type(module).__name__)


def _natural_parts(
    observation: Space, stack: int, scale_images: bool, normaliser: Normaliser | None
) -> dict[str, ObservationPart]:
    if observation.kind == "dict":
        raise InputError("Agent.from_module takes environments with one observation; flatten the Dict first")
    part = ObservationPart(
        observation,
        normaliser,
        stack,
        transpose=observation.is_image and observation.shape[2] < min(observation.shape[:2]),
        scale=255.0 if observation.is_image and scale_images else 1.0,
    )
    return {"": part}


def _flat(module: nn.Module) -> list[nn.Module]:
    """The layers of nested Sequentials, in order; the same module objects."""
    if isinstance(module, nn.Sequential):
        return [layer for child in module for layer in _flat(child)]
    return [module]


def _try(actor: Actor, parts: dict[str, ObservationPart], head: Head) -> None:
    example = {key: torch.zeros(2, *part.network_shape) for key, part in parts.items()}
    try:
        with torch.no_grad():
            outputs, _ = actor(example)
    except Exception as error:
        raise InputError(
            f"the module does not take observations {list(example[''].shape)}: {error}"
        ) from None
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (2, head.outputs):
        shape = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise InputError(
            f"the module puts out {shape}, but {head.space.describe()} takes [n, {head.outputs}]"
        )
