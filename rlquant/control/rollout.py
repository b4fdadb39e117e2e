"""Seeded episodes of a policy: all of them step together, one batched forward pass a step.

Episode ``i`` starts with ``env.reset(seed=seed + i)``, acts deterministically with a frozen normaliser, and
its score is the raw return. Precisions that are evaluated on the same seeds see the same episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import gymnasium as gym
import numpy as np

from rlquant.control.agent import Agent
from rlquant.control.environment import EnvSpec, make_env
from rlquant.control.program_session import ProgramSession, runtime_of
from rlquant.control.realtime import Coupling
from rlquant.control.session import TILE, Recorder, Session
from rlquant.errors import InputError
from rlquant.measure import single_thread

__all__ = ["MAX_STEPS", "EnvPool", "Rollout", "rollout"]

MAX_STEPS = 1_000_000
"""An episode this long never ends; its environment has no time limit."""

_MEMORY_BUDGET_ENVS = 128


@dataclass(frozen=True)
class Rollout:
    """Scores of episodes, in episode order.

    Attributes:
        returns: float64 ``[episodes]``, undiscounted sums of raw rewards.
        lengths: int64 ``[episodes]``, steps.
        timing: float64 ``[episodes, 4]`` in real time: observations seen and taken, actions late, sum of delays in
            periods (see ``Timing`` in ``envs/realtime.py``); ``[episodes, 0]`` in a world that waits.
    """

    returns: np.ndarray
    lengths: np.ndarray
    timing: np.ndarray


@dataclass
class EnvPool:
    """Environments of one spec, made once and reused by every precision."""

    spec: EnvSpec
    envs: list[gym.Env] = field(default_factory=list)

    def take(self, count: int) -> list[gym.Env]:
        """The first ``count`` environments, making those that are missing."""
        while len(self.envs) < count:
            self.envs.append(make_env(self.spec))
        return self.envs[:count]

    def close(self) -> None:
        """Close them all."""
        while self.envs:
            self.envs.pop().close()


def rollout(
    agent: Agent,
    episodes: Sequence[int],
    *,
    seed: int,
    pool: EnvPool | None = None,
    batch: int = _MEMORY_BUDGET_ENVS,
    workers: int = 1,
    device: str = "cpu",
    runtime: str = "torch",
    recorder: Recorder | None = None,
    coupling: Coupling | None = None,
) -> Rollout:
    """Run episodes and return their scores; bit-identical for every ``batch`` and ``workers``.

    Args:
        agent: the policy; ``agent.env`` makes the environments.
        episodes: consecutive episode numbers; number ``i`` is seeded with ``seed + i``.
        seed: of episode 0.
        pool: environments to reuse; made and closed here by default.
        batch: how many episodes step together at most.
        workers: processes; each takes a consecutive share of the episodes.
        device: where the network runs, in torch.
        runtime: ``torch``, or one of ``rlquant.deploy.RUNTIMES``.
        recorder: see :class:`~rlquant.control.session.Session`; needs one worker and torch.
        coupling: the world does not wait for the policy; None where it does.

    Raises:
        InputError: no episodes, or an episode that does not end.
    """
    numbers = list(episodes)
    if not numbers or batch < 1 or workers < 1:
        raise InputError("at least one episode, one environment and one worker are needed")
    if workers > 1 and len(numbers) > 1 and recorder is None:
        return _in_processes(agent, numbers, seed, batch, workers, device, runtime, coupling)
    own = pool or EnvPool(agent.env)
    try:
        with single_thread():
            shares = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
            make = _session_maker(agent, device, runtime, recorder)
            done = [_run_batch(agent, share, seed, own, make, coupling) for share in shares]
    finally:
        if pool is None:
            own.close()
    return _joined(done)


def _joined(rollouts: list[Rollout]) -> Rollout:
    names = [each.name for each in fields(Rollout)]
    return Rollout(*(np.concatenate([getattr(done, name) for done in rollouts]) for name in names))


SessionMaker = Callable[[int], Session | ProgramSession]


def _session_maker(agent: Agent, device: str, runtime: str, recorder: Recorder | None) -> SessionMaker:
    if runtime == "torch":
        return lambda rows: Session(agent, rows, device=device, recorder=recorder)
    made = runtime_of(agent, runtime)
    return lambda rows: ProgramSession(agent, rows, runtime=made)


def _run_batch(
    agent: Agent,
    numbers: list[int],
    seed: int,
    pool: EnvPool,
    session_for: SessionMaker,
    coupling: Coupling | None,
) -> Rollout:
    # An episode's row depends on its number alone, so that it meets the same arithmetic in any batch.
    base = numbers[0] // TILE * TILE
    rows = [number - base for number in numbers]
    count = rows[-1] + 1
    taken = pool.take(len(rows))
    envs: dict[int, Any] = dict(zip(rows, map(coupling.wrap, taken) if coupling else taken, strict=True))
    session = session_for(count)
    world = _World(agent, count)
    for row, number in zip(rows, numbers, strict=True):
        world.show(row, envs[row].reset(seed=seed + number)[0], envs[row])
    returns, lengths = np.zeros(count), np.zeros(count, np.int64)
    live = np.zeros(count, bool)
    live[rows] = True
    starts = live.copy()
    while live.any():
        acting = live if coupling is None else _asking(envs, live)
        if acting.any():
            actions = session.act(world.observations, starts, acting, world.masks)
        starts[:] = False
        for row in np.flatnonzero(live).tolist():
            observation, reward, terminated, truncated, _ = envs[row].step(actions[row])
            returns[row] += float(reward)
            lengths[row] += 1
            if terminated or truncated:
                live[row] = False
            else:
                world.show(row, observation, envs[row])
        if lengths.max() >= MAX_STEPS:
            raise InputError(f"an episode of {agent.env.id} did not end within {MAX_STEPS:,} steps")
    timing = [[] if coupling is None else astuple(envs[row].timing) for row in rows]
    return Rollout(returns[rows], lengths[rows], np.asarray(timing, float))


def _asking(envs: dict[int, Any], live: np.ndarray) -> np.ndarray:
    """Of the live rows, those whose policy is not busy with an earlier observation."""
    asking = live.copy()
    for row in np.flatnonzero(live).tolist():
        asking[row] = envs[row].asks
    return asking


class _World:
    """What ``count`` environments show: observation buffers by key, and action masks for masked policies."""

    def __init__(self, agent: Agent, count: int) -> None:
        self._parts = {
            key: np.zeros((count, *part.space.shape), part.space.dtype) for key, part in agent.parts.items()
        }
        self._plain = "" in self._parts
        self.observations: Any = self._parts[""] if self._plain else self._parts
        self.masks = np.ones((count, agent.head.outputs), bool) if agent.masked else None

    def show(self, row: int, observation: Any, env: gym.Env) -> None:
        if self._plain:
            self.observations[row] = observation
        else:
            for key, part in self._parts.items():
                part[row] = observation[key]
        if self.masks is not None:
            self.masks[row] = env.get_wrapper_attr("action_masks")()


def _in_processes(
    agent: Agent, numbers: list[int], seed: int, batch: int, workers: int, *how: Any
) -> Rollout:
    import multiprocessing

    shares = [part.tolist() for part in np.array_split(numbers, min(workers, len(numbers)))]
    # A forked copy of a process that has used torch's threads can hang, so fresh processes are spawned.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(shares), mp_context=context) as executor:
        jobs = [executor.submit(_share, agent, share, seed, batch, *how) for share in shares]
        return _joined([job.result() for job in jobs])


def _share(
    agent: Agent,
    numbers: list[int],
    seed: int,
    batch: int,
    device: str,
    runtime: str,
    coupling: Coupling | None,
) -> Rollout:
    return rollout(agent, numbers, seed=seed, batch=batch, device=device, runtime=runtime, coupling=coupling)
