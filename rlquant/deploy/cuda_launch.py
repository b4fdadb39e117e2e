"""A generated program on its device: the compiled kernels, what they read, and CUDA graphs of a launch."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rlquant.deploy.c_build import cache_folder
from rlquant.deploy.cuda_constants import power_of_two
from rlquant.deploy.cuda_source import CudaSource, generate
from rlquant.deploy.program import Program
from rlquant.errors import InputError

__all__ = ["Kernels", "graph_of"]

_WARPS = 8
_INBOX_BLOCK = 1024  # words of a request that are looked at at once


class Kernels:
    """The two kernels of a program, with its numbers on a device.

    Attributes:
        source: what was generated.
        path: of the generated module.
    """

    def __init__(self, program: Program, device: torch.device, folder: Path | None) -> None:
        from rlquant.deploy import cuda_ops

        self.program, self.device = program, device
        self.source: CudaSource = generate(program)
        self.path = _written(self.source.text, folder or cache_folder())
        module = _loaded(self.path)
        self._program = {"hold": module.hold, "compute": module.compute}
        self._batch, self._serve = cuda_ops.batch, cuda_ops.serve
        self._numbers = [torch.from_numpy(x).to(device) for x in self.source.blocks.arrays()]
        self.words = program.head.outputs + program.head.size
        self.observation = sum(program.buffers[i].size for i in range(len(program.inputs)))
        # Loops over memory are worth an overlap of loads and products.
        stages = 1 if self.source.in_registers else 3
        self._options = {"num_warps": _WARPS, "num_stages": stages, "enable_fp_fusion": False}
        self._one = self._scratch(1)
        self._at_once = 1
        if device.type == "cuda":
            each = 1 if self.source.in_registers else 2  # blocks of threads, as many as registers allow
            self._at_once = each * torch.cuda.get_device_properties(device).multi_processor_count

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers on the device: weights of up to 8 bits take one each, others one for each 8 bits."""
        return sum(x.nbytes for x in self._numbers)

    def batch(self, observations: torch.Tensor, states: torch.Tensor, results: torch.Tensor) -> None:
        """Runs ``[n, size]`` float32 observations; ``results`` int32 ``[n, words]``, ``states`` in place."""
        rows = 128 if self.source.in_registers else 32
        if self.device.type == "cpu":
            rows = min(1024, power_of_two(len(observations)))
        blocks = min(-(-len(observations) // rows), self._at_once)
        scratch = self._scratch(rows * blocks)
        with self._current():
            self._batch[(blocks,)](
                observations, states, results, *self._numbers, *scratch, len(observations),
                rows=rows, **self._program, **self._options,
            )  # fmt: skip

    def serve(self, box: list[torch.Tensor], patience: int, requests: int) -> None:
        """Answers requests; ``box``: inbox, outbox, number of the last request, observation, states."""
        size = self.observation + 1
        # A word for each thread, or all warps would look at the same ones, one after the other over the bus.
        block = min(_INBOX_BLOCK, power_of_two(size, 32 * _WARPS))
        self._serve[(1,)](
            *box, *self._numbers, *self._one, patience, requests,
            size=size, block=block, remembered=self.program.state_size,
            answer=self.words, **self._program, **self._options,
        )  # fmt: skip

    def _current(self) -> AbstractContextManager[object]:
        """Launches go to the device that is current."""
        if self.device.type == "cpu":
            return nullcontext()
        current: AbstractContextManager[object] = torch.cuda.device(self.device)
        return current

    def _scratch(self, rows: int) -> list[torch.Tensor]:
        """Memory for rows that are computed at once; what was there is never read."""
        wide = torch.empty(rows * self.source.wide + 1, dtype=torch.float32, device=self.device)
        return [wide, torch.empty(rows * self.source.narrow + 1, dtype=torch.int8, device=self.device)]


def graph_of(launch: Callable[..., None], device: torch.device) -> tuple[int, int, int, Callable[[], object]]:
    """A CUDA graph of what ``launch(looks)`` launches.

    Returns:
        The address of cuGraphLaunch, the graph, its stream, and a function that waits for the stream and gives the
        graph back. On the CPU, the address of ``launch`` itself.
    """
    if device.type == "cpu":

        def call(graph: int, stream: int) -> int:
            launch()
            return 0

        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(call)
        return ctypes.cast(callback, ctypes.c_void_p).value or 0, 0, 0, lambda: callback
    driver = ctypes.CDLL("libcuda.so.1")
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # which waits for no other stream
    graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
    handle = ctypes.c_void_p(stream.cuda_stream)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):
        launch(0)  # compiled and loaded before it is captured; finds no request
        stream.synchronize()
        _call(driver.cuStreamBeginCapture_v2, handle, 1)
        try:
            launch()
        finally:
            _call(driver.cuStreamEndCapture, handle, ctypes.byref(graph))
    _call(driver.cuGraphInstantiateWithFlags, ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    _call(driver.cuGraphDestroy, graph)
    address = ctypes.cast(driver.cuGraphLaunch, ctypes.c_void_p).value or 0

    def finish() -> None:
        stream.synchronize()
        driver.cuGraphExecDestroy(executable)

    return address, executable.value or 0, stream.cuda_stream, finish


def _call(function: Any, *arguments: Any) -> None:
    status = function(*arguments)
    if status:
        raise RuntimeError(f"{function.__name__} failed with CUDA error {status}")


def _written(text: str, folder: Path) -> Path:
    """The module's file; Triton reads the source of what it compiles."""
    path = folder / f"program_{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, suffix=".py", delete=False, encoding="utf-8"
            ) as file:
                file.write(text)
            os.replace(file.name, path)
        except OSError as error:
            raise InputError(
                f"the cache {folder} cannot be written ({error.strerror}): name another folder in XDG_CACHE_HOME"
            ) from error
    return path


@cache
def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
