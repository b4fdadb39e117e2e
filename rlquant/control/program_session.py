"""Episodes of an agent whose program runs in one of the runtimes of ``rlquant.deploy``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlquant.control.agent import Agent
from rlquant.control.compile import compile_agent
from rlquant.control.observation import FrameStack
from rlquant.control.session import Session, batch_of_one
from rlquant.deploy.runtime import Runtime, make_runtime

__all__ = ["ProgramSession", "actor_in", "runtime_of"]


class ProgramSession:
    """Acts for several episodes at once, as :class:`~rlquant.control.session.Session` does.

    A row's action does not depend on the other rows.

    Args:
        agent: whose program runs.
        rows: episodes.
        runtime: of the agent's program; see :func:`runtime_of`.

    Attributes:
        outputs: head outputs float32 ``[rows, outputs]`` of the last step.
    """

    def __init__(self, agent: Agent, rows: int, *, runtime: Runtime) -> None:
        self.agent, self.rows = agent, rows
        self.runtime = runtime
        self._states = np.zeros((rows, runtime.program.state_size), np.float32)
        self._frames = {key: FrameStack(part, rows) for key, part in agent.parts.items() if part.stack > 1}
        self.outputs = np.zeros((rows, agent.head.outputs), np.float32)

    def act(
        self,
        observations: Any,
        starts: np.ndarray,
        live: np.ndarray | None = None,
        masks: np.ndarray | None = None,
    ) -> np.ndarray:
        """See :meth:`rlquant.control.session.Session.act`."""
        parts = observations if isinstance(observations, dict) else {"": observations}
        stacked = {key: self._stacked(key, x, starts, live) for key, x in parts.items()}
        chosen = np.arange(self.rows) if live is None else np.flatnonzero(live)
        self._states[starts] = 0
        states = self._states[chosen]
        self.outputs[chosen] = self.runtime.outputs({key: x[chosen] for key, x in stacked.items()}, states)
        self._states[chosen] = states
        return self.runtime.program.head(self.outputs, masks)

    def _stacked(self, key: str, x: np.ndarray, starts: np.ndarray, live: np.ndarray | None) -> np.ndarray:
        return self._frames[key].push(x, starts, live) if key in self._frames else x


def runtime_of(agent: Agent, name: str) -> Runtime:
    """The runtime called ``name`` of an agent's program.

    Raises:
        InputError: the agent cannot be compiled, or the runtime is unknown or lacks what it needs.
    """
    return make_runtime(name, compile_agent(agent))


def actor_in(agent: Agent, runtime: str, device: str = "cpu") -> Callable[[Any], np.ndarray]:
    """What maps one observation to an action, in the middle of an episode.

    Args:
        agent: fp32 or quantized.
        runtime: ``torch``, or one of ``rlquant.deploy.RUNTIMES``.
        device: of torch.

    Raises:
        InputError: as :func:`runtime_of`.
    """
    if runtime != "torch" and all(part.stack == 1 for part in agent.parts.values()):
        return runtime_of(agent, runtime).act
    starts = np.zeros(1, bool)
    session: Session | ProgramSession = (
        Session(agent, rows=1, tile=1, device=device)
        if runtime == "torch"
        else ProgramSession(agent, 1, runtime=runtime_of(agent, runtime))
    )

    def act(observation: Any) -> np.ndarray:
        action: np.ndarray = session.act(batch_of_one(observation), starts)[0]
        return action

    return act
