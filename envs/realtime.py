"""The world does not wait: an action computed in t seconds acts t seconds after its observation.

Gymnasium stops the world while a policy computes. Here it goes on, by the rules of one sensor, one policy and one
actuator, each in continuous time (nanoseconds), while the environment runs at its control rate, period T:

- Observation k is seen at kT and is the newest until (k + 1)T.
- A policy that is free takes the newest observation that it has not taken yet: at once, or when the next one comes.
  It computes for L; its action acts from then on, and it is free again. One computation is in flight at a time, so
  where L exceeds T the observations in between are missed, and where a computation ends within a period it goes on
  with the observation that came while it was busy, already somewhat old.
- Until a new action arrives the last one goes on acting. An episode begins with the neutral action: zeros moved into
  the bounds of a Box, and choice 0 of every discrete kind.
- A simulator runs in n sub-steps a period, and an action acts from the sub-step boundary nearest to its arrival (the
  later one in a tie). Gymnasium's MuJoCo environments take n = ``frame_skip``; the others step once a period, n = 1:
  an action later than half a period acts one period late, an earlier one is in time, so that rounding favours nobody.

L = 0 is the plain environment, bit for bit. L = T is the real-time Markov decision process, which delays each action
by exactly one period, of Ramstedt and Pal (2019), "Real-Time Reinforcement Learning", arXiv:1911.04448. Delays in
general: Katsikopoulos and Engelbrecht (2003), "Markov decision processes with delays and asynchronous cost collection".
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from rlquant.errors import InputError

__all__ = ["RealTime", "Timing"]


@dataclass
class Timing:
    """What has happened in an episode.

    Attributes:
        seen: observations, the one that the episode ended with not counted.
        taken: those that the policy computed an action for; it missed the others.
        late: actions that took longer than one period.
        delay: sum over actions of the periods between an observation and the first effect of its action.
    """

    seen: int = 0
    taken: int = 0
    late: int = 0
    delay: float = 0.0


class RealTime(gym.Wrapper):
    """Let the environment run on while the policy computes.

    ``step`` takes the action computed from the newest observation at every step, and ignores it where :attr:`asks`
    is False: the policy has missed that observation. A policy with memory moves it only where :attr:`asks` is True.
    Reward and info are those of the environment's own step, given the action that acts at the end of the period.

    The latencies are replayed in the order in which they were measured, so that slow calls that came together
    stay together, from a place that the seed of the episode decides.

    Args:
        env: any environment with Box, Discrete, MultiDiscrete or MultiBinary actions. Where it masks actions, one
            that arrives late may be forbidden by then.
        latency_us: microseconds from observation to action, a number or an array ``[n]`` of measured ones.
        control_rate_hz: periods a second; by default what a MuJoCo environment simulates.

    Attributes:
        timing: of the present episode.

    Raises:
        InputError: no latency or one that is negative or no number, no control rate or one that is not positive,
            or another kind of actions.
    """

    def __init__(self, env: gym.Env, latency_us: Any, control_rate_hz: float | None = None) -> None:
        super().__init__(env)
        rate = _simulated_rate(env) if control_rate_hz is None else control_rate_hz
        if not (np.isfinite(rate) and rate > 0):
            raise InputError(f"the control rate must be a positive number, not {rate}")
        latencies = np.atleast_1d(np.asarray(latency_us, np.float64))
        if latencies.ndim != 1 or latencies.size == 0 or not ((latencies >= 0) & (latencies < 1e15)).all():
            raise InputError(
                "latencies must be a number or a list of numbers of microseconds, each 0 or more and below 1e15"
            )
        self._latencies = [round(1e3 * latency) for latency in latencies.tolist()]
        self._period = max(1, round(1e9 / rate))
        self._substeps = _substeps(env)
        self._neutral = _neutral_action(env.action_space)
        self._random: np.random.Generator | None = None
        self._begin(0)

    @property
    def asks(self) -> bool:
        """Whether the policy takes the newest observation; known before its action is, for time alone decides."""
        return self._free < (self._step + 1) * self._period

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: the policy is free and the neutral action acts."""
        if seed is not None or self._random is None:
            self._random = np.random.default_rng(seed)
        self._begin(int(self._random.integers(len(self._latencies))))
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One period, with what acts in it: the last action, and those that arrive."""
        self.timing.seen += 1
        if self.asks:
            self._compute(action)
        parts = self._parts()
        self._step += 1
        with _acting_in_parts(self.unwrapped, parts):
            return self.env.step(parts[-1][0])

    def _begin(self, first_latency: int) -> None:
        self.timing = Timing()
        self._step = 0  # the present period
        self._free = 0  # when the policy is free, in nanoseconds of the episode
        self._next = first_latency
        self._acting = self._neutral
        self._arriving: deque[tuple[int, Any]] = deque()  # (sub-step of the episode, action)

    def _compute(self, action: Any) -> None:
        """Start computing on the newest observation; the outcome is known, but arrives later."""
        latency = self._latencies[self._next % len(self._latencies)]
        self._next += 1
        self._free = max(self._free, self._step * self._period) + latency
        arrival = (2 * self._free * self._substeps + self._period) // (2 * self._period)
        self._arriving.append((arrival, copy.copy(action)))
        self.timing.taken += 1
        self.timing.late += latency > self._period
        self.timing.delay += (arrival - self._step * self._substeps) / self._substeps

    def _parts(self) -> list[tuple[Any, int]]:
        """(action, sub-steps) of the present period, in order."""
        parts: list[tuple[Any, int]] = []
        now, end = self._step * self._substeps, (self._step + 1) * self._substeps
        while self._arriving and self._arriving[0][0] < end:
            arrival, action = self._arriving.popleft()
            if arrival > now:
                parts.append((self._acting, arrival - now))
                now = arrival
            self._acting = action
        return [*parts, (self._acting, end - now)]


def _simulated_rate(env: gym.Env) -> float:
    if not _is_mujoco(env.unwrapped):
        raise InputError(f"{env} does not say how many steps make a second; give control_rate_hz")
    return 1 / float(env.unwrapped.dt)


def _substeps(env: gym.Env) -> int:
    """Parts of one step that can have different actions.

    Only Gymnasium's own MuJoCo environments are known to simulate exactly the action that they are given.
    """
    layer = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, gym.ActionWrapper):
            return 1
        layer = layer.env
    return int(layer.frame_skip) if _is_mujoco(layer) else 1


def _is_mujoco(inner: Any) -> bool:
    return type(inner).__module__.startswith("gymnasium.envs.mujoco.")


def _neutral_action(space: gym.Space) -> Any:
    if isinstance(space, gym.spaces.Box):
        return np.clip(np.zeros(space.shape, space.dtype), space.low, space.high)
    if isinstance(space, gym.spaces.Discrete):
        return space.start
    if isinstance(space, gym.spaces.MultiDiscrete | gym.spaces.MultiBinary):
        return np.zeros(space.shape, space.dtype)
    raise InputError(
        f"actions in {space} have no neutral one; supported: Box, Discrete, MultiDiscrete, MultiBinary"
    )


@contextmanager
def _acting_in_parts(inner: Any, parts: list[tuple[Any, int]]) -> Iterator[None]:
    """Inside, a simulation of the environment's step runs in parts, each with its action."""
    if len(parts) == 1:
        yield
        return
    simulate = inner.do_simulation

    def simulate_in_parts(_action: Any, _substeps: int) -> None:
        for action, substeps in parts:
            simulate(action, substeps)

    inner.do_simulation = simulate_in_parts
    try:
        yield
    finally:
        del inner.do_simulation
