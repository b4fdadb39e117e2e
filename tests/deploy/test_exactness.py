"""Every runtime gives the reference's bits: every agent at hand, ten thousand observations, extremes among them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_programs import memories, observations
from shipped import SHIPPED, compiled

from rlquant.deploy import reference
from rlquant.deploy.c_source import action_type
from rlquant.deploy.export_c import export_c
from rlquant.deploy.native import NativeRuntime
from rlquant.deploy.program import Program
from rlquant.errors import InputError

ZOO = os.environ.get("RLQUANT_TEST_ZOO")
OTHERS = sorted(str(path) for path in Path(ZOO).glob("*/*_1")) if ZOO else []
SCHEMES = ("w8a8", "w4a8-g32")
CHUNK, CHUNKS = 1000, 10

Outputs = Callable[[dict[str, np.ndarray], np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From observations and memory, which is updated, to head outputs and actions."""

pytestmark = pytest.mark.slow


@cache
def programmed(source: str, scheme: str) -> Program:
    """Skips where no program can do the scheme."""
    try:
        return compiled(source, scheme)
    except InputError as error:
        pytest.skip(str(error))


def shown(x: dict[str, np.ndarray]) -> Any:
    return x[""] if set(x) == {""} else x


def native(program: Program, folder: Path) -> Outputs:
    runtime = NativeRuntime(program, cache=folder)

    def run(x: dict[str, np.ndarray], states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = runtime.act_batch(shown(x), states=states.copy())
        return runtime.outputs(shown(x), states), actions

    return run


def onnx(program: Program, folder: Path) -> Outputs:
    pytest.importorskip("onnxruntime")
    from rlquant.deploy.onnx_runtime import OnnxRuntime

    runtime = OnnxRuntime(program)

    def run(x: dict[str, np.ndarray], states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = runtime.act_batch(shown(x), states=states.copy())
        return runtime.outputs(shown(x), states), actions

    return run


def cuda(program: Program, folder: Path) -> Outputs:
    """On a GPU, or in Triton's interpreter where there is none."""
    pytest.importorskip("triton")
    from rlquant.deploy.cuda import CudaRuntime

    runtime = CudaRuntime(program, device="cuda" if torch.cuda.is_available() else "cpu", cache=folder)

    def run(x: dict[str, np.ndarray], states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            actions = runtime.act_batch(shown(x), states=states.copy())
            return runtime.outputs(shown(x), states), actions

    return run


def exported(program: Program, folder: Path) -> Outputs:
    """The C files, as another program would link them; memory lasts from call to call, so it starts at zeros."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    export_c(program, folder)
    command = ["gcc", "-std=c99", "-O2", "-shared", "-fPIC", "policy.c", "-lm", "-o", "policy.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "policy.so"))
    kinds = {"policy_index": np.int32, "int8_t": np.int8, "float": np.float32}

    def run(x: dict[str, np.ndarray], states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = len(next(iter(x.values())))
        flat = np.concatenate([part.reshape(rows, -1) for part in x.values()], axis=1).astype(np.float32)
        outputs = np.empty((rows, program.head.outputs), np.float32)
        actions = np.empty((rows, *program.head.action_shape), kinds[action_type(program.head)])
        for row in range(rows):
            at = [ctypes.c_void_p(array[row:].ctypes.data) for array in (flat, outputs, actions)]
            library.policy_reset()
            assert library.policy_outputs(at[0], at[1]) == 0
            library.policy_reset()
            assert library.policy_act(at[0], at[2]) == 0
        return outputs, actions

    return run


@pytest.mark.parametrize("runtime", [native, onnx, exported, cuda], ids=lambda make: make.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("source", [*SHIPPED, *OTHERS], ids=lambda source: "-".join(Path(source).parts[-2:]))
def test_ten_thousand_observations(
    source: str, scheme: str, runtime: Callable[[Program, Path], Outputs], tmp_path: Path
) -> None:
    program = programmed(source, scheme)
    assert program.is_integer
    run = runtime(program, tmp_path)
    rows, chunks = _count(source, runtime)
    for seed in range(chunks):
        x = observations(program, rows, seed)
        states = memories(program, rows, seed) * (runtime is not exported)
        after = states.copy()
        with np.errstate(all="ignore"):
            expected = reference.run(program, x, after)
        outputs, actions = run(x, states)
        np.testing.assert_array_equal(outputs.view(np.int32), expected.view(np.int32))
        np.testing.assert_array_equal(actions, program.head(expected))
        if runtime is not exported:
            np.testing.assert_array_equal(states.view(np.int32), after.view(np.int32))


def _count(source: str, runtime: Callable[[Program, Path], Outputs]) -> tuple[int, int]:
    """Observations of a chunk, and chunks; fewer in Triton's interpreter, which is slow."""
    if runtime is not cuda or torch.cuda.is_available():
        return CHUNK, CHUNKS
    return (64 if source == "cnn-catch" else 256), 1
