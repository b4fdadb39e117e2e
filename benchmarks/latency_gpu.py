"""How long one action takes on a GPU, and how many actions of a batch it makes a second, beside stock SB3 and torch.

    python benchmarks/latency_gpu.py [--calls 5000] [--batch 65536] [--out benchmarks/latency_gpu.md]

One action: Python call in with a NumPy observation, NumPy action out, all contenders in turns in one process. A
batch: float32 observations on the GPU already, actions left there; each contender is captured in a CUDA graph, so
that Python's time is left out, and as it is called from Python. The network has random weights.
"""

from __future__ import annotations

import argparse
import datetime
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import triton
from latency import NETWORKS, Blank, built
from torch import nn

from rlquant.control import quantize_agent
from rlquant.control.collect import Inputs
from rlquant.control.compile import compile_agent
from rlquant.deploy.cuda import CudaRuntime
from rlquant.deploy.program import Program
from rlquant.measure import measure_side_by_side

SIZE = "17-256-256-6"
FLOOR = "empty kernel in a CUDA graph + synchronize"


@triton.jit
def empty() -> None:
    """Nothing."""


def saved(model: Any) -> io.BytesIO:
    """SB3's file of a model."""
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    return file


def plain(model: Any) -> nn.Module:
    """The deterministic actor as torch layers, tanh at the end."""
    actor = model.policy.actor
    return nn.Sequential(*actor.latent_pi, actor.mu, nn.Tanh()).eval().requires_grad_(False)


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a function that reads and writes the same memory each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def eager(net: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Copies, layer after layer."""

    @torch.no_grad()
    def act(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = net(torch.from_numpy(x[None]).cuda()).cpu().numpy()[0]
        return found

    return act


def graphed(net: nn.Module, inputs: int, outputs: int) -> Callable[[np.ndarray], np.ndarray]:
    """Copies and layers in one CUDA graph, from pinned memory to pinned memory."""
    given, taken = torch.zeros(1, inputs, pin_memory=True), torch.zeros(1, outputs, pin_memory=True)

    @torch.no_grad()
    def compute() -> None:
        taken.copy_(net(given.to("cuda", non_blocking=True)), non_blocking=True)

    graph = captured(compute)
    host_given, host_taken = given.numpy()[0], taken.numpy()[0]

    def act(x: np.ndarray) -> np.ndarray:
        host_given[...] = x
        graph.replay()
        torch.cuda.synchronize()
        return host_taken.copy()

    return act


def floor_acts() -> dict[str, Callable[[np.ndarray], object]]:
    """One empty kernel and a wait for it."""
    graph = captured(lambda: empty[(1,)]())

    def launch(x: np.ndarray) -> None:
        empty[(1,)]()
        torch.cuda.synchronize()

    def replay(x: np.ndarray) -> None:
        graph.replay()
        torch.cuda.synchronize()

    return {"empty kernel from Triton + synchronize": launch, FLOOR: replay}


def batches(net: nn.Module, runtime: CudaRuntime, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Contenders for a batch."""
    half = net.to(torch.bfloat16)
    found: dict[str, Callable[[], object]] = {"rlquant cuda w8a8": lambda: runtime.act_tensor(x)}
    for mode in ("max-autotune-no-cudagraphs", "default"):
        torch.compiler.reset()
        compiled = torch.compile(lambda x: half(x.to(torch.bfloat16)), mode=mode)

        @torch.no_grad()
        def act(compiled: Any = compiled) -> object:
            return compiled(x)

        act()
        found[f"torch.compile bf16, {mode}"] = act
    return found


def milliseconds(
    functions: dict[str, Callable[[], object]], rounds: int = 20, calls: int = 50
) -> dict[str, float]:
    """Median over rounds of the time of a call; contenders in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(5):
                function()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / calls * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def batch_lines(net: nn.Module, program: Program, count: int) -> list[str]:
    """Table of batches."""
    x = torch.randn(count, program.inputs[""][0], device="cuda")
    called = batches(net, CudaRuntime(program), x)
    replayed = {name: captured(function).replay for name, function in called.items()}
    lines = [
        "| batch | policy | ms in a CUDA graph | million actions/s | ms called from Python |",
        "|---|---|---|---|---|",
    ]
    in_graph, from_python = milliseconds(replayed), milliseconds(called)
    for name in called:
        rate = count / in_graph[name] / 1e3
        lines.append(f"| {count} | {name} | {in_graph[name]:.4f} | {rate:.0f} | {from_python[name]:.4f} |")
    best = min(time for name, time in in_graph.items() if name.startswith("torch"))
    lines += [
        "",
        f"w8a8 makes {best / in_graph['rlquant cuda w8a8']:.2f}x the actions of the faster torch.compile.",
    ]
    return lines


def main() -> None:
    """Time everything and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=65536)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    gym.register("Blank-v0", Blank)
    network = NETWORKS[SIZE]
    inputs, outputs = network.shape[0], network.outputs
    on_cpu, agent = built(network)
    model = network.algorithm.load(saved(on_cpu), device="cuda")
    x = np.random.default_rng(0).normal(0, 1, (256, inputs)).astype(np.float32)
    calibration = Inputs({"": torch.from_numpy(x)}, None)
    programs = {
        name: compile_agent(quantize_agent(agent, name, inputs=calibration))
        for name in ("w8a8", "w4a8", "fp32")
    }
    net = plain(model)
    with torch.no_grad():
        expected = net(torch.from_numpy(x).cuda()).cpu().numpy()
    assert np.abs(CudaRuntime(programs["fp32"]).act_batch(x) - expected).max() < 1e-4
    acts: dict[str, Any] = {
        "SB3 predict on cuda": lambda x: model.predict(x, deterministic=True)[0],
        "torch eager": eager(net),
        "torch in a CUDA graph, pinned copies": graphed(net, inputs, outputs),
        **floor_acts(),
        **{f"rlquant cuda {name}": CudaRuntime(program).act for name, program in programs.items()},
        "rlquant cuda w8a8, resident": CudaRuntime(programs["w8a8"], resident=True).act,
    }
    timed = measure_side_by_side(acts, list(x), calls=options.calls)
    medians = {name: float(np.median(times)) / 1e3 for name, times in timed.items()}
    lines = [
        "| network | policy | p50 us | p99 us | faster than SB3 | of the floor |",
        "|---|---|---|---|---|---|",
    ]
    for name, times in timed.items():
        ratios = (
            f"{medians['SB3 predict on cuda'] / medians[name]:.1f}x | {medians[name] / medians[FLOOR]:.2f}x"
        )
        p99 = np.quantile(times, 0.99) / 1e3
        lines.append(f"| {SIZE} | {name} | {medians[name]:.2f} | {p99:.2f} | {ratios} |")
    lines += ["", f"The floor: {FLOOR}.", "", *batch_lines(net, programs["w8a8"], options.batch)]
    command = f"python benchmarks/latency_gpu.py --calls {options.calls} --batch {options.batch}"
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python call to NumPy action"
    lines += [
        "",
        f"`{command}`, {datetime.date.today().isoformat()}, {torch.cuda.get_device_name()}, {versions}.",
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
