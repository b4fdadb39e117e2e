"""The shipped agents, and programs of them."""

from __future__ import annotations

from functools import cache

from rlquant.control import collect, load, quantize_agent
from rlquant.control.compile import compile_agent
from rlquant.deploy.program import Program

SHIPPED = (
    "dqn-cartpole",
    "ppo-cartpole",
    "ppo-lunarlander",
    "sac-pendulum",
    "sac-halfcheetah",
    "tqc-hopper",
    "recurrentppo-cartpole",
    "cnn-catch",
)


@cache
def compiled(name: str, scheme: str) -> Program:
    """A shipped agent's program, rounded to nearest on the inputs of one episode."""
    agent = load(name)
    if scheme == "fp32":
        return compile_agent(agent)
    return compile_agent(quantize_agent(agent, scheme, inputs=collect(agent, 1, seed=5, limit=500)))
