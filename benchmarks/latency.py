"""What one action costs beside stock SB3 and ONNX Runtime: time, first call, and bytes of the artifact.

    python benchmarks/latency.py [--calls 5000] [--out benchmarks/latency.md]

Python call in, NumPy action out, one thread, pinned to one core. Networks have random weights and the sizes of usual
policies: three MLPs, NatureCNN on 4 x 84 x 84 (Mnih et al. 2015, as SB3's CnnPolicy builds it) and an LSTM of 256
(sb3-contrib's MlpLstmPolicy). All contenders of a network take turns in one process, so a machine that slows down slows
them all; ratios of medians are what counts.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces

from rlquant.control import Agent, from_sb3, quantize_agent
from rlquant.control.collect import Inputs
from rlquant.control.compile import compile_agent
from rlquant.control.environment import EnvSpec
from rlquant.deploy.files import save_program
from rlquant.deploy.program import Program
from rlquant.deploy.runtime import make_runtime
from rlquant.measure import MachineState, measure_side_by_side, pinned, single_thread, watched
from rlquant.runs import machine_info

PRECISIONS = ("fp32", "w8a8", "w4a8")
LOADS = 7


@dataclass(frozen=True)
class Network:
    """A policy of SB3 or sb3-contrib.

    Attributes:
        algorithm: its class. PPO and DQN act by choices, the others by numbers.
        policy: SB3's name of the kind of policy.
        shape: of an observation.
        outputs: choices, or numbers of an action.
        hidden: sizes of the layers, where they are not SB3's own.
    """

    algorithm: Any
    policy: str
    shape: tuple[int, ...]
    outputs: int
    hidden: tuple[int, ...] = ()


NETWORKS = {
    "8-64-64-4": Network(sb3.PPO, "MlpPolicy", (8,), 4, (64, 64)),
    "17-256-256-6": Network(sb3.SAC, "MlpPolicy", (17,), 6, (256, 256)),
    "376-400-300-17": Network(sb3.TD3, "MlpPolicy", (376,), 17, (400, 300)),
    "NatureCNN 4x84x84": Network(sb3.PPO, "CnnPolicy", (4, 84, 84), 6),
    "LSTM-256, 17 inputs": Network(sb3_contrib.RecurrentPPO, "MlpLstmPolicy", (17,), 6),
}


class Blank(gym.Env[Any, Any]):
    """An environment of given sizes in which nothing happens."""

    def __init__(self, shape: tuple[int, ...], outputs: int, discrete: bool) -> None:
        image = len(shape) == 3
        self.observation_space = (
            spaces.Box(0, 255, shape, np.uint8) if image else spaces.Box(-3, 3, shape, np.float32)
        )
        self.action_space = (
            spaces.Discrete(outputs) if discrete else spaces.Box(-1, 1, (outputs,), np.float32)
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Zeros."""
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape or (), self.observation_space.dtype), {}

    def step(self, action: Any) -> Any:
        """Zeros."""
        return self.reset()[0], 0.0, True, False, {}


def built(network: Network) -> tuple[Any, Agent]:
    """The model in SB3, and the agent of it."""
    kwargs = {
        "shape": network.shape,
        "outputs": network.outputs,
        "discrete": network.algorithm is sb3.PPO,
    }
    spec = EnvSpec("Blank-v0", kwargs)
    options = {"policy_kwargs": {"net_arch": list(network.hidden)}} if network.hidden else {}
    env = gym.make(spec.id, **spec.kwargs)
    model = network.algorithm(network.policy, env, seed=0, device="cpu", **options)
    return model, from_sb3(model, env=spec)


def observations_of(network: Network) -> np.ndarray:
    """64 of them, ``[64, *shape]``."""
    rng = np.random.default_rng(0)
    if len(network.shape) == 3:
        return rng.integers(0, 256, (64, *network.shape)).astype(np.uint8)
    return rng.normal(0, 1, (64, *network.shape)).astype(np.float32)


def programs_of(agent: Agent, observations: np.ndarray) -> dict[str, Program]:
    """By precision; ranges are those of the observations, and of memory that fills its range."""
    scaled = torch.from_numpy(agent.parts[""].to_network(observations))
    state = agent.actor.initial_state(len(observations))
    if state is not None:
        state = tuple(torch.tanh(torch.randn_like(part)) for part in state)
    inputs = Inputs({"": scaled}, state)
    return {name: compile_agent(quantize_agent(agent, name, inputs=inputs)) for name in PRECISIONS}


def predict_of(model: Any) -> Callable[[Any], Any]:
    """Stock SB3; its memory, if it has one, goes from call to call."""
    if not hasattr(model.policy, "lstm_actor"):
        return lambda x: model.predict(x, deterministic=True)[0]
    state, start = None, np.zeros(1, bool)

    def predict(x: Any) -> Any:
        nonlocal state
        action, state = model.predict(x, state=state, episode_start=start, deterministic=True)
        return action

    return predict


def timing_lines(name: str, model: Any, programs: dict[str, Program], x: np.ndarray, calls: int) -> list[str]:
    """A line of the table for each contender."""
    acts = {"SB3 predict": predict_of(model), "ONNX Runtime fp32": make_runtime("onnx", programs["fp32"]).act}
    acts |= {
        f"native {precision}": make_runtime("native", program).act for precision, program in programs.items()
    }
    with single_thread():
        timed = measure_side_by_side(acts, list(x), calls=calls)
    medians = {act: float(np.median(times[1:])) / 1e3 for act, times in timed.items()}
    lines = []
    for act, times in timed.items():
        p99 = float(np.quantile(times[1:], 0.99)) / 1e3
        peers = ("SB3 predict", "ONNX Runtime fp32", "native fp32")
        ratios = [f"{medians[peer] / medians[act]:.2f}x" for peer in peers]
        cells = [f"{medians[act]:.2f}", f"{p99:.2f}", f"{p99 / medians[act]:.1f}", *ratios]
        lines.append(f"| {name} | {act} | " + " | ".join(cells) + " |")
    return lines


_FIRST_ACTION = """
import sys, time
import numpy as np
started = time.perf_counter()
from rlquant.deploy.files import load_program
from rlquant.deploy.runtime import make_runtime
imported = time.perf_counter()
program = load_program(sys.argv[1])
runtime = make_runtime("native", program)
runtime.act(np.zeros(program.inputs[""], np.float32))
print(imported - started, time.perf_counter() - imported)
"""


def first_action(folder: str) -> tuple[float, ...]:
    """Seconds of the imports of rlquant, and from there to the first action, in a fresh process."""
    # As after a usual installation: modules need not be compiled to bytecode each time.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": tempfile.gettempdir()}
    command = [sys.executable, "-c", _FIRST_ACTION, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **compiled})
    return tuple(map(float, done.stdout.split()))


def size_lines(name: str, agent: Agent, programs: dict[str, Program]) -> list[str]:
    """A line for each precision: bytes, and the milliseconds until a fresh process has acted."""
    fp32 = 4 * sum(parameter.numel() for parameter in agent.actor.parameters())
    lines = []
    for precision, program in programs.items():
        runtime: Any = make_runtime("native", program)
        held, working = runtime.constants.nbytes, runtime.nbytes - runtime.constants.nbytes
        with tempfile.TemporaryDirectory() as folder:
            disk = save_program(program, folder)
            first = [first_action(folder) for _ in range(LOADS)]
        ours, ready = 1e3 * np.median(first, axis=0)
        cells = [f"{disk:,}", f"{disk / fp32:.3f}x", f"{held:,}", f"{held / fp32:.3f}x", f"{working:,}"]
        lines.append(f"| {name} | {precision} | " + " | ".join(cells) + f" | {ready:.0f} | {ours:.0f} |")
    return lines


def main() -> None:
    """Time all networks and write the tables."""
    gym.register("Blank-v0", Blank)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    timings = [
        "| network | policy | p50 us | p99 us | p99 / p50 | faster than SB3 | than ONNX Runtime | than native fp32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sizes = [
        "| network | program | bytes on disk | of fp32 | constants in memory | of fp32 | working memory "
        "| ms to the first action | ms of imports |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with watched() as machine, pinned() as machine.core:
        for name, network in NETWORKS.items():
            model, agent = built(network)
            observations = observations_of(network)
            programs = programs_of(agent, observations)
            found = timing_lines(name, model, programs, observations, options.calls)
            found_sizes = size_lines(name, agent, programs)
            timings, sizes = timings + found, sizes + found_sizes
            print("\n".join(found + found_sizes), flush=True)
    text = "\n".join([*timings, "", *sizes, "", *notes(options.calls, machine), ""])
    options.out.write_text(text, encoding="utf-8")


def notes(calls: int, machine: MachineState) -> list[str]:
    """What the tables say, and where they were made."""
    remarks = [f"{remark[0].upper()}{remark[1:]}." for remark in machine.remarks()]
    return [
        "Bytes of fp32 are 4 for each parameter of the network. On disk is all of a program's folder; constants and",
        "working memory are all that the native runtime holds. The first action: a program's folder is read, checked",
        f"against its hash, and acts, its library in the cache; median of {LOADS} fresh processes, after Python, NumPy",
        "and the imports of rlquant, which are named beside it.",
        "",
        f"`python benchmarks/latency.py --calls {calls}`, {datetime.date.today().isoformat()}, "
        f"{machine_info()['processor']}, one thread on one core. {' '.join(remarks)}".rstrip(),
    ]


if __name__ == "__main__":
    main()
