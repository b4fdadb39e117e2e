"""What only a real GPU can show: kernels that stay, and leave."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shipped import compiled

from rlquant.deploy.cuda import CudaRuntime
from rlquant.deploy.files import save_program
from rlquant.deploy.program import Program
from rlquant.deploy.runtime import ReferenceRuntime

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def program() -> Program:
    return compiled("dqn-cartpole", "w8a8")


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 2, (500, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(program: Program, x: np.ndarray) -> np.ndarray:
    return ReferenceRuntime(program).act_batch(x)


def actions(runtime: CudaRuntime, x: np.ndarray) -> np.ndarray:
    return np.array([runtime.act(row) for row in x])


def test_a_resident_kernel_outlives_many_calls(program: Program, x: np.ndarray, expected: np.ndarray) -> None:
    """It leaves and comes back on the way: after each 100,000 requests."""
    with CudaRuntime(program, resident=True) as runtime:
        for _ in range(500):
            np.testing.assert_array_equal(actions(runtime, x), expected)


def test_other_work_runs_beside_it(program: Program, x: np.ndarray, expected: np.ndarray) -> None:
    a = torch.randn(1024, 1024, device="cuda")
    want = (a @ a).sum().item()
    with (
        CudaRuntime(program, resident=True) as one,
        CudaRuntime(program, resident=True) as other,
        CudaRuntime(program) as launched,
    ):
        for _ in range(5):
            for runtime in (one, other, launched):
                np.testing.assert_array_equal(actions(runtime, x[:50]), expected[:50])
            assert (a @ a).sum().item() == want
            np.testing.assert_array_equal(one.act_batch(x), expected)


def test_it_leaves_when_nobody_asks(program: Program, x: np.ndarray, expected: np.ndarray) -> None:
    with CudaRuntime(program, resident=True, patience=2000) as runtime:
        for _ in range(3):
            assert runtime.act(x[0]) == expected[0]
            start = time.monotonic()
            torch.cuda.synchronize()  # waits for it
            assert runtime.is_waiting is False
            assert time.monotonic() - start < 5


def test_pauses_of_any_length(program: Program, x: np.ndarray, expected: np.ndarray) -> None:
    """Also those in which it is just leaving."""
    pauses = np.random.default_rng(0).uniform(0, 0.004, 500)
    with CudaRuntime(program, resident=True, patience=1000) as runtime:
        for row, want, pause in zip(x, expected, pauses, strict=True):
            assert runtime.act(row) == want
            end = time.perf_counter() + pause
            while time.perf_counter() < end:
                pass


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "import gc; del runtime; gc.collect()"])
def test_a_process_ends_though_a_kernel_waits(program: Program, tmp_path: Path, end: str) -> None:
    save_program(program, tmp_path / "program")
    code = f"""
import numpy as np
from rlquant.deploy.cuda import CudaRuntime
from rlquant.deploy.files import load_program
runtime = CudaRuntime(load_program({str(tmp_path / "program")!r}), resident=True, patience=2_000_000_000)
runtime.act(np.zeros(4, np.float32))
print("acted", flush=True)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "acted"), done.stderr


def test_another_thread_may_act(program: Program, x: np.ndarray, expected: np.ndarray) -> None:
    found: list[np.ndarray] = []
    with CudaRuntime(program) as runtime:
        thread = threading.Thread(target=lambda: found.append(actions(runtime, x)))
        thread.start()
        thread.join()
        np.testing.assert_array_equal(found[0], expected)
