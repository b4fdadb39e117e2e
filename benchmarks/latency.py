"""How long one action takes beside stock SB3 and ONNX Runtime: Python call in, NumPy action out, one thread.

    python benchmarks/latency.py [--calls 5000] [--out benchmarks/latency.md]

Networks have random weights and the sizes of usual policies. All contenders of a size take turns in one process, so
a machine that slows down slows them all; ratios of medians are what counts.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3 as sb3
import torch
from gymnasium import spaces

from rlquant.control import Agent, from_sb3, quantize_agent
from rlquant.control.collect import Inputs
from rlquant.control.compile import compile_agent
from rlquant.control.environment import EnvSpec
from rlquant.deploy.runtime import make_runtime
from rlquant.measure import measure_side_by_side, single_thread
from rlquant.runs import machine_info

SIZES: dict[str, tuple[Any, int, int, list[int]]] = {
    "8-64-64-4": (sb3.PPO, 8, 4, [64, 64]),
    "17-256-256-6": (sb3.SAC, 17, 6, [256, 256]),
    "376-400-300-17": (sb3.TD3, 376, 17, [400, 300]),
}
PRECISIONS = ("fp32", "w8a8", "w4a8")


class Blank(gym.Env[Any, Any]):
    """An environment of given sizes in which nothing happens; PPO gets choices, the others numbers."""

    def __init__(self, inputs: int, outputs: int, discrete: bool) -> None:
        self.observation_space = spaces.Box(-3, 3, (inputs,), np.float32)
        self.action_space = (
            spaces.Discrete(outputs) if discrete else spaces.Box(-1, 1, (outputs,), np.float32)
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Zeros."""
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape or (), np.float32), {}

    def step(self, action: Any) -> Any:
        """Zeros."""
        return np.zeros(self.observation_space.shape or (), np.float32), 0.0, True, False, {}


def contenders(size: str, observations: np.ndarray) -> dict[str, Any]:
    """``act`` by name."""
    cls, inputs, outputs, hidden = SIZES[size]
    spec = EnvSpec("Blank-v0", {"inputs": inputs, "outputs": outputs, "discrete": cls is sb3.PPO})
    env = gym.make(spec.id, **spec.kwargs)
    model = cls("MlpPolicy", env, policy_kwargs={"net_arch": hidden}, seed=0, device="cpu")
    agent: Agent = from_sb3(model, env=spec)
    acts: dict[str, Any] = {"SB3 predict": lambda x: model.predict(x, deterministic=True)[0]}
    calibration = Inputs({"": torch.from_numpy(observations)}, None)
    for precision in PRECISIONS:
        program = compile_agent(quantize_agent(agent, precision, inputs=calibration))
        acts[f"native {precision}"] = make_runtime("native", program).act
        if precision == "fp32":
            acts["ONNX Runtime fp32"] = make_runtime("onnx", program).act
    return acts


def main() -> None:
    """Time all sizes and write the table."""
    gym.register("Blank-v0", Blank)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    lines = [
        "| network | policy | p50 us | p99 us | faster than SB3 | than ONNX Runtime | than native fp32 |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for size in SIZES:
        observations = np.random.default_rng(0).normal(0, 1, (256, SIZES[size][1])).astype(np.float32)
        with single_thread():
            timed = measure_side_by_side(
                contenders(size, observations), list(observations), calls=options.calls
            )
        medians = {name: float(np.median(times)) / 1e3 for name, times in timed.items()}
        for name, times in timed.items():
            ratios = [
                medians[peer] / medians[name] for peer in ("SB3 predict", "ONNX Runtime fp32", "native fp32")
            ]
            cells = [
                f"{medians[name]:.2f}",
                f"{np.quantile(times, 0.99) / 1e3:.2f}",
                *(f"{r:.2f}x" for r in ratios),
            ]
            lines.append(f"| {size} | {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    machine = machine_info()
    command = f"python benchmarks/latency.py --calls {options.calls}"
    lines += ["", f"`{command}`, {datetime.date.today().isoformat()}, {machine['processor']}, one thread."]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
