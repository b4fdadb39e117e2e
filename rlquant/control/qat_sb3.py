"""Quantization-aware training inside Stable-Baselines3, by one line: a callback.

    model = SAC("MlpPolicy", "Pendulum-v1")
    model.learn(20_000, callback=QuantizationCallback("w4a8", delay=2_000))
    agent = quantized_agent(model)      # evaluate it, save it as an artifact

For ``delay`` steps the policy trains in float. Then the layers that choose actions are swapped, in place, for
trainable quantized ones (LSQ: Esser et al. 2020, arXiv:1902.08153; LSQ+: Bhalgat et al. 2020,
arXiv:2004.09576), with ranges from the observations that the model has collected itself. Quantization-aware
training of policies with such a delay is that of QuaRL (Krishnan et al. 2022, arXiv:1910.01055). From the swap
on the acting policy *is* the quantized one, in rollouts and in the loss: a policy that acts quantized and is
updated as float has wrong probability ratios (PPO) and wrong targets. Critics stay in float, they are not
deployed; target networks of what acts (DQN, TD3) are swapped alike.

A trained agent is fine-tuned by the same line, after ``SAC.load``.

The float parameters stay the same objects, so optimisers go on with them; scales and zero points join them as
a second parameter group, at the same learning rate. Observations are standardised, and the first layer absorbs
that, which is what decides at 2 to 4 bits. Until the freeze the map is chosen anew when observations leave its
grid, because a policy that learns goes to new places; each change is exact for the float weights.
``model.save`` and ``SAC.load`` work as ever, wherever rlquant is installed.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import Tensor, nn

from rlquant.control.agent import Agent
from rlquant.control.environment import EnvSpec
from rlquant.control.load import from_sb3
from rlquant.control.sb3_acting import LAYOUTS, Layout
from rlquant.errors import InputError
from rlquant.quant import MixedScheme, QATController, Scheme, get_observer

__all__ = ["QuantizationCallback", "QuantizedPolicy", "quantized_agent"]

_ROWS = 4096  # observations from which ranges come, at most,
_VALUES = 2**24  # and the numbers in them, at most: images are large
_ENOUGH = 256  # observations, at least
_CHECK_EVERY = 1000  # environment steps between two looks at where the observations have gone


class QuantizationCallback(BaseCallback):
    """Trains an SB3 model quantized; see the module's text.

    One callback serves one ``learn``; a later one starts its counts anew.

    Args:
        scheme: integer weights of 2 to 16 bits; activations static, dynamic or float. Observations keep at
            least 8 bits.
        delay: environment steps in float. The swap comes with the first rollout after it, and never before
            there are observations to choose ranges from (256, and as many as ``learning_starts``).
        freeze_after: environment steps from the swap after which scales, zero points and the observation map
            stay as they are; None for never.
        observer: the rule that chooses the first ranges, see ``rlquant.quant.OBSERVERS``.
        verbose: 1 to print when the policy is swapped and frozen.

    Raises:
        InputError: for an unknown scheme or a negative number, and at the start of ``learn`` for an algorithm,
            features extractor or scheme that cannot be trained so. The model is then unchanged.
    """

    def __init__(
        self,
        scheme: str | Scheme | MixedScheme,
        *,
        delay: int = 0,
        freeze_after: int | None = None,
        observer: str = "mse",
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if delay < 0 or (freeze_after is not None and freeze_after < 0):
            raise InputError(f"delay ({delay}) and freeze_after ({freeze_after}) count steps: 0 or more")
        get_observer(observer)
        self.scheme = MixedScheme.of(scheme)
        self.delay, self.freeze_after, self.observer = delay, freeze_after, observer
        self.swapped_at: int | None = None
        self.frozen = False

    def _init_callback(self) -> None:
        self.swapped_at, self.frozen = None, False
        self._checked_at = 0
        self._recent: deque[np.ndarray] = deque()
        layout, kept = _layout(self.model), self.model.policy_class
        if not isinstance(kept, QuantizedPolicy):
            _check_buffer(self.model)
            for network in layout.acting(self.model.policy):
                network.check(self.scheme)
        elif kept.scheme != self.scheme.name:
            raise InputError(
                f"this model trains at {kept.scheme} already; it cannot go on at {self.scheme.name}"
            )
        else:
            self.swapped_at = self._checked_at = self.model.num_timesteps
            self.frozen = kept.frozen

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if isinstance(self.model, OnPolicyAlgorithm) and not self.frozen:
            # SB3 empties this buffer before the next rollout starts.
            rows = _rows(self.model, self.model.rollout_buffer.observations)
            self._recent.append(_thinned(self.model, rows).copy())
            while sum(map(len, self._recent)) - len(self._recent[0]) >= _row_limit(self.model):
                self._recent.popleft()

    def _on_rollout_start(self) -> None:
        if self.frozen:
            return
        if self.swapped_at is None:
            if self.num_timesteps >= max(self.delay, getattr(self.model, "learning_starts", 0)):
                self._swap()
        elif self.freeze_after is not None and self.num_timesteps >= self.swapped_at + self.freeze_after:
            self._freeze()
        elif self.num_timesteps >= self._checked_at + _CHECK_EVERY:
            self._follow()

    def _swap(self) -> None:
        seen = self._seen()
        if seen is None:
            return
        model: Any = self.model
        _swap(model.policy, _layout(model), self.scheme, seen, self.observer)
        model.policy_class = QuantizedPolicy(
            model.policy_class, type(model).__name__, self.scheme.name, self.observer
        )
        self.swapped_at = self._checked_at = self.num_timesteps
        self._say("quantized")

    def _follow(self) -> None:
        """Let the observation map cover where the policy has gone since."""
        self._checked_at = self.num_timesteps
        seen = self._seen()
        if seen is not None:
            for network in _layout(self.model).acting(self.model.policy):
                network.follow(seen)

    def _freeze(self) -> None:
        kept = self.model.policy_class
        assert isinstance(kept, QuantizedPolicy)
        QATController(self.model.policy).freeze()
        kept.frozen = self.frozen = True
        self._say("froze the grids")

    def _seen(self) -> Tensor | None:
        """Observations of late, as the network sees them; None where there are too few yet."""
        model: Any = self.model
        if isinstance(model, OnPolicyAlgorithm):
            parts = [*self._recent]
        else:
            parts = [_rows(model, model.replay_buffer.observations[: model.replay_buffer.size()])]
        if sum(map(len, parts)) < _ENOUGH:
            return None
        return _network_inputs(model, np.concatenate([_thinned(model, part) for part in parts]))

    def _say(self, what: str) -> None:
        if self.verbose:
            print(f"{what} ({self.scheme.name}) after {self.num_timesteps} steps")


class QuantizedPolicy:
    """Stands for the policy class in a saved model: builds SB3's policy and swaps the quantized layers in.

    The values of parameters, scales and ranges then come from the checkpoint, as for any policy. The observer stays the
    one that chose the first ranges: where the observation map is chosen anew, it chooses the weights' grid again.
    """

    observer = "mse"  # of models that were saved without one

    def __init__(self, policy_class: Any, algorithm: str, scheme: str, observer: str) -> None:
        self.policy_class, self.algorithm, self.scheme = policy_class, algorithm, scheme
        self.observer = observer
        self.frozen = False
        self.__name__ = policy_class.__name__  # which SB3 reads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A policy, as SB3 calls its class."""
        policy = self.policy_class(*args, **kwargs)
        _swap(policy, LAYOUTS[self.algorithm], MixedScheme.parse(self.scheme), None, self.observer)
        if self.frozen:
            QATController(policy).freeze()
        return policy


def quantized_agent(model: Any, *, env: str | EnvSpec | None = None) -> Agent:
    """The agent of a model that a :class:`QuantizationCallback` trains: exactly its acting policy.

    Args:
        model: the SB3 model, after the swap.
        env: as for :func:`~rlquant.control.from_sb3`.

    Raises:
        InputError: the model is not quantized (yet).
    """
    if not isinstance(model.policy_class, QuantizedPolicy):
        raise InputError(
            f"this {type(model).__name__} is not quantized: train it with QuantizationCallback, beyond its delay"
        )
    agent = from_sb3(_float_model(model), env=env)
    actor = _layout(model).acting(model.policy)[0].stored()
    assert isinstance(actor.trunk, nn.Sequential)
    if agent.head.kind == "tanh" and isinstance(actor.trunk[-1], nn.Tanh):
        actor.trunk.pop(-1)  # TD3 squashes in its network, our head squashes by itself
    return agent.with_actor(actor, model.policy_class.scheme, "qat")


def _float_model(model: Any) -> Any:
    """The model with a fresh float policy of the same sizes, which tells everything but the weights."""
    plain = copy.copy(model)
    sde = {"use_sde": model.use_sde} if isinstance(model, OnPolicyAlgorithm) else {}
    with torch.random.fork_rng():
        plain.policy = model.policy_class.policy_class(
            model.observation_space, model.action_space, lambda _: 0.0, **sde, **model.policy_kwargs
        )
    return plain


def _layout(model: Any) -> Layout:
    name = type(model).__name__
    if name not in LAYOUTS:
        raise InputError(
            f"{name} cannot be trained quantized inside Stable-Baselines3; {', '.join(LAYOUTS)} can. "
            "Distil the trained agent instead: rlquant.control.distill"
        )
    return LAYOUTS[name]


def _swap(policy: Any, layout: Layout, scheme: MixedScheme, inputs: Tensor | None, observer: str) -> None:
    """Quantize what acts, and let its optimiser train the scales and zero points too."""
    new = [network.prepare(scheme, inputs, observer) for network in layout.acting(policy)]
    layout.optimizer_of(policy).add_param_group({"params": new[0]})


def _check_buffer(model: Any) -> None:
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None and buffer.buffer_size * buffer.n_envs < _ENOUGH:
        raise InputError(
            f"a replay buffer of {buffer.buffer_size * buffer.n_envs} observations is too small to choose ranges "
            f"from; {_ENOUGH} are needed: pass buffer_size=... (to load(), for a loaded model)"
        )


def _rows(model: Any, observations: np.ndarray) -> np.ndarray:
    """Observations of a buffer, ``[steps, envs, *shape]``, ``[steps, envs, 1]`` or flat, as ``[n, *shape]``."""
    return observations.reshape(-1, *model.observation_space.shape)


def _row_limit(model: Any) -> int:
    size = int(np.prod(model.observation_space.shape, dtype=np.int64))
    return max(_ENOUGH, min(_ROWS, _VALUES // size))


def _thinned(model: Any, rows: np.ndarray) -> np.ndarray:
    """Rows at equal distances, as many as the limit allows."""
    return rows[:: max(1, -(-len(rows) // _row_limit(model)))]


def _network_inputs(model: Any, rows: np.ndarray) -> Tensor:
    """Observations ``[n, *shape]`` of a buffer as the network sees them."""
    normalise = model.get_vec_normalize_env()
    if normalise is not None and not isinstance(model, OnPolicyAlgorithm):
        rows = normalise.normalize_obs(rows)  # replay buffers keep what the environment showed
    tensor = torch.as_tensor(rows, device=model.device)
    inputs = preprocess_obs(tensor, model.observation_space, normalize_images=model.policy.normalize_images)
    assert isinstance(inputs, Tensor)
    return inputs
