"""The GPU runtime: a program as one Triton kernel.

One observation at a time goes through memory of the host that the GPU reads and writes itself, so a call is one
launch of a CUDA graph and no copy; a resident kernel, which waits on the GPU for the next observation, needs no
launch either. Batches run in blocks of rows on tensor cores; layers of up to 512 numbers hand over in registers.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlquant.deploy.c_build import kernel_text, shared_library
from rlquant.deploy.cuda_device import check_device
from rlquant.deploy.cuda_launch import Kernels, graph_of
from rlquant.deploy.native import caller_module
from rlquant.deploy.program import Program
from rlquant.deploy.runtime import checked_states, flattened
from rlquant.errors import InputError

__all__ = ["CudaRuntime"]

Array = NDArray[Any]
Floats = NDArray[np.float32]

_ACTIONS: dict[str, tuple[int, type]] = {
    "argmax": (0, np.int64),
    "multi_argmax": (0, np.int64),
    "threshold": (1, np.int8),
}
_FRESH = 1  # of cuda_ops: the request begins an episode
_NOT_LAUNCHED = -2  # of kernels/cuda.c
_GIVEN_UP = 10_000_000_000  # nanoseconds
# Requests after which a resident kernel makes room for what waits for the whole device, and is launched anew.
_LIFE = 100_000


class _Mailbox(ctypes.Structure):
    """As in ``kernels/cuda.c``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inbox", "outbox", "launch", "graph", "stream")),
        *((name, ctypes.c_int64) for name in ("observation", "outputs", "action", "patience")),
        *((name, ctypes.c_int32) for name in ("tag", "command", "resident", "kind")),
    )


class CudaRuntime:
    """Runs a program on a GPU.

    Weights of up to 8 bits take a byte each on the GPU, whatever they take on disk: its tensor cores read bytes.

    One instance serves one thread at a time, which Python's lock sees to. A resident kernel occupies one
    multiprocessor of the GPU while it waits. It leaves after ``patience`` looks at an empty inbox (about a
    microsecond each), or after 100,000 requests, and the next call launches it again: until then, calls that wait
    for the whole device (``torch.cuda.synchronize``, freeing memory) wait for it too.

    Attributes:
        program: what it runs.
        source: path of the generated Triton module.
        resident: whether a kernel stays on the GPU between calls.
    """

    name = "cuda"

    def __init__(
        self,
        program: Program,
        *,
        device: str | torch.device = "cuda",
        resident: bool = False,
        patience: int = 50_000,
        cache: Path | None = None,
    ) -> None:
        """Compiles what Triton's cache does not hold.

        Args:
            program: what to run.
            device: a CUDA device; or ``cpu``, where Triton's interpreter runs (``TRITON_INTERPRET=1``): for tests.
            resident: keep a kernel on the GPU that waits for observations.
            patience: looks at an empty inbox after which it leaves.
            cache: a folder for what is generated; by default ``$XDG_CACHE_HOME/rlquant`` or ``~/.cache/rlquant``.

        Raises:
            InputError: no Triton, no such device, no C compiler, or the cache cannot be written.
        """
        self.program = program
        self.device = torch.device(device)
        check_device(self.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.resident = resident
        self._kernels = Kernels(program, self.device, cache)
        self.source = self._kernels.path
        self._kind, self._dtype = _ACTIONS.get(program.head.kind, (2, np.float32))
        self._open(patience, cache)

    @property
    def nbytes(self) -> int:
        """Bytes of the constants on the GPU."""
        return self._kernels.nbytes

    @property
    def is_waiting(self) -> bool:
        """Whether a resident kernel waits on the GPU for the next observation."""
        return self.resident and not self._outbox[-1].item()

    def reset(self) -> None:
        """An episode begins; see :meth:`rlquant.deploy.runtime.Runtime.reset`."""
        self._box.command = _FRESH

    def act(self, observation: Any, masks: Any = None) -> Any:
        """The action for one observation.

        Args:
            observation: ``[*shape]``, or a dict of such; numbers of any kind, infinite or not but never NaN.
            masks: bool ``[outputs]``: choices that are allowed.

        Returns:
            An int64 number or ``[branches]``, int8 ``[*shape]`` or float32 ``[*shape]``; a new array each time.

        Raises:
            InputError: another shape or kind of observation, or NaN in it; or the runtime is closed.
        """
        if masks is None:
            return self._fast(observation)
        return self._slow(observation, masks)

    def act_batch(self, observations: Any, masks: Any = None, states: Floats | None = None) -> Array:
        """Actions ``[n, ...]`` for ``[n, *shape]``; see :meth:`rlquant.deploy.runtime.Runtime.act_batch`."""
        results = self._run_batch(observations, states)
        if masks is not None:
            return self.program.head(self._outputs(results), np.asarray(masks, np.bool_))
        actions = np.ascontiguousarray(results[:, self.program.head.outputs :])
        numbers = actions.view(np.float32) if self._kind == 2 else actions.astype(self._dtype)
        return numbers.reshape(len(results), *self.program.head.action_shape)

    def outputs(self, observations: Any, states: Floats | None = None) -> Floats:
        """float32 ``[n, outputs]`` for ``[n, *shape]``; see :meth:`rlquant.deploy.runtime.Runtime.outputs`."""
        return self._outputs(self._run_batch(observations, states))

    def act_tensor(self, observations: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        """Actions of observations that are on the GPU already; nothing is copied, waited for or looked at for NaN.

        Args:
            observations: float32 ``[n, size]``, contiguous: all keys side by side.
            states: float32 ``[n, state_size]``, contiguous, updated in place; None begins an episode for each row.

        Returns:
            float32 ``[n, size]`` for actions that are numbers, int32 for choices.

        Raises:
            InputError: another shape, dtype or device.
        """
        rows = len(observations)
        self._check("observations", observations, (rows, self._kernels.observation))
        if states is not None:
            self._check("states", states, (rows, self.program.state_size))
        actions = self._on_device(observations, states)[:, self.program.head.outputs :]
        return actions.view(torch.float32) if self._kind == 2 else actions

    def close(self) -> None:
        """Sends a resident kernel away; the runtime takes no more single observations. Done at exit too."""
        self._finish()
        self._fast = self._closed

    def __enter__(self) -> CudaRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- batches

    def _check(self, what: str, given: torch.Tensor, shape: tuple[int, int]) -> None:
        fits = given.dtype == torch.float32 and given.device == self.device and given.is_contiguous()
        if not fits or given.shape != shape:
            raise InputError(
                f"expected contiguous float32 {what} {list(shape)} on {self.device}, got {given.dtype} "
                f"{list(given.shape)} on {given.device}"
            )

    def _run_batch(self, observations: Any, states: Floats | None) -> Array:
        """int32 ``[n, words]``."""
        flat = flattened(self.program, observations)
        states = checked_states(self.program, states, len(flat))
        remembered = None if states is None else torch.from_numpy(states).to(self.device)
        results = self._on_device(torch.from_numpy(flat).to(self.device), remembered)
        if states is not None:
            assert remembered is not None
            states[...] = remembered.cpu().numpy()
        found: Array = results.cpu().numpy()
        return found

    def _on_device(self, observations: torch.Tensor, states: torch.Tensor | None) -> torch.Tensor:
        count = len(observations)
        if states is None:
            states = torch.zeros((count, self.program.state_size), device=self.device)
        results = torch.empty((count, self._kernels.words), dtype=torch.int32, device=self.device)
        if count:
            self._kernels.batch(observations, states, results)
        return results

    def _outputs(self, results: Array) -> Floats:
        return np.ascontiguousarray(results[:, : self.program.head.outputs]).view(np.float32)

    # --- single observations

    def _open(self, patience: int, cache: Path | None) -> None:
        """Memory that both sides see, and a way to launch the kernel that serves it."""
        head, kernels, pinned = self.program.head, self._kernels, self.device.type == "cuda"
        shared = [
            torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
            for size in (kernels.observation + 1, kernels.words + 1)
        ]
        own = [
            torch.zeros(size, dtype=dtype, device=self.device)
            for size, dtype in (
                (1, torch.int32),
                (kernels.observation, torch.float32),
                (max(1, self.program.state_size), torch.float32),
            )
        ]
        requests = _LIFE if self.resident else 1
        looks = patience if pinned else 1

        def launch(looks: int = looks) -> None:
            kernels.serve([*shared, *own], looks, requests)

        address, graph, stream, finish = graph_of(launch, self.device)
        library = ctypes.PyDLL(str(shared_library(kernel_text("cuda.c"), cache)))
        self._run = library.policy_run
        self._run.restype = ctypes.c_int64
        self._run.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64]
        self._outbox = shared[1]
        self._outbox[-1] = 1  # no kernel is there
        self._box = _Mailbox(
            shared[0].data_ptr(), shared[1].data_ptr(), address, graph, stream,
            kernels.observation, head.outputs, head.size, _GIVEN_UP, 0, 0, self.resident, self._kind,
        )  # fmt: skip
        everything = (library, shared, own, kernels, self._box)
        self._finish = weakref.finalize(self, _finish, library, self._box, finish, everything)
        self._fast = self._slow
        caller = caller_module(cache) if list(self.program.inputs) == [""] else None
        if caller is not None:
            function = ctypes.cast(self._run, ctypes.c_void_p).value
            kind = np.dtype(self._dtype).num
            shapes = (self.program.inputs[""], head.action_shape)
            places = (function, 0, ctypes.addressof(self._box), 0)
            self._fast = caller.Caller(*places, *shapes, kind, self._slow, everything)

    def _slow(self, observation: Any, masks: Any = None) -> Any:
        if not self._finish.alive:
            return self._closed(observation)
        head = self.program.head
        flat = flattened(self.program, observation, batch=False)
        action: Array = np.empty(head.action_shape, self._dtype)
        outputs = np.empty((1, head.outputs), np.float32)
        given, taken = flat.ctypes.data, action.ctypes.data
        places = (0, ctypes.addressof(self._box), given, 0, taken, outputs.ctypes.data, 0)
        status = self._run(*places, 1)
        if status == _NOT_LAUNCHED and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # this thread is new to it
            status = self._run(*places, 1)
        if status:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # which raises what went wrong there
            raise RuntimeError(f"the GPU gave no answer (status {status})")
        if masks is None:
            return action[()]
        allowed = np.asarray(masks, np.bool_)
        if allowed.size != head.outputs:
            raise InputError(f"expected masks of {head.outputs} choices, got {list(allowed.shape)}")
        return self.program.head(outputs, allowed[None])[0]

    def _closed(self, observation: Any) -> Any:
        raise InputError("this runtime was closed: make another one")


def _finish(library: Any, box: _Mailbox, finish: Callable[[], object], everything: object) -> None:
    """No kernel may be there when the memory that it reads is given back, which ``everything`` keeps till then."""
    if box.resident:
        library.mailbox_close(ctypes.byref(box))
    finish()
