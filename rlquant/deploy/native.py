"""The native runtime: a program in C, compiled by the system's compiler for this processor, called at once.

The source depends on the program's shapes alone; its numbers lie in one block of memory that is handed over with
each call, so programs of one shape share a library. Between Python and the C function stands a small extension
module (``kernels/caller.c``), or ctypes where Python's headers are missing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sysconfig
import warnings
from dataclasses import replace
from functools import cache as memoize
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.c_build import NATIVE_FLAGS, kernel_text, shared_library
from rlquant.deploy.c_constants import ALIGNMENT, Block
from rlquant.deploy.c_floats import FloatNumbers
from rlquant.deploy.c_memory import layout
from rlquant.deploy.c_source import generate
from rlquant.deploy.c_vector import VectorProducts
from rlquant.deploy.program import Program
from rlquant.deploy.runtime import checked_states, flattened
from rlquant.errors import InputError

__all__ = ["NativeRuntime", "caller_module", "native_source"]

Array = NDArray[Any]
Floats = NDArray[np.float32]
_ACTION_DTYPES = {"policy_index": np.int64, "int8_t": np.int8, "float": np.float32}


class NativeRuntime:
    """Runs a program in C.

    One instance serves one thread at a time, which Python's lock sees to.

    Attributes:
        program: what it runs, less the operations: their numbers are in ``constants``, and nowhere twice.
        constants: uint8: the weights, packed, and all other numbers.
    """

    name = "native"

    def __init__(self, program: Program, *, cache: Path | None = None, flags: tuple[str, ...] = NATIVE_FLAGS):
        """Builds the library where the cache does not hold it.

        Args:
            program: what to run.
            cache: a folder for libraries; by default ``$XDG_CACHE_HOME/rlquant`` or ``~/.cache/rlquant``.
            flags: of the compiler.

        Raises:
            InputError: no compiler, or it failed; or the cache cannot be written.
        """
        self.program = replace(program, ops=())
        source, self.constants, kind = native_source(program)
        path = shared_library(source, cache, flags)
        library = ctypes.PyDLL(str(path))  # keeps Python's lock: the working memory is one
        self._memory = _aligned(ctypes.c_int64.in_dll(library, "policy_memory_bytes").value)
        self._run = library.policy_run
        self._run.restype = ctypes.c_int64
        self._run.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64]
        self._states = np.zeros((1, program.state_size), np.float32)
        self._action = (np.dtype(_ACTION_DTYPES[kind]), program.head.action_shape)
        self._prepare()
        self._fast = self._prepared
        caller = caller_module(cache) if list(program.inputs) == [""] else None
        if caller is not None:
            address = ctypes.cast(self._run, ctypes.c_void_p).value
            arrays = (self.constants, self._memory, self._states)
            places = (address, *(array.ctypes.data for array in arrays))
            shape = program.inputs[""]
            owners = (library, *arrays)
            self._fast = caller.Caller(
                *places, shape, self._action[1], self._action[0].num, self._slow, owners
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the constants, of the working memory and of what it remembers."""
        return self.constants.nbytes + self._memory.nbytes + self._states.nbytes

    def act(self, observation: Any, masks: Any = None) -> Any:
        """The action for one observation.

        Args:
            observation: ``[*shape]``, or a dict of such; numbers of any kind, infinite or not but never NaN.
            masks: bool ``[outputs]``: choices that are allowed.

        Returns:
            An int64 number or ``[branches]``, int8 ``[*shape]`` or float32 ``[*shape]``; a new array each time.

        Raises:
            InputError: another shape or kind of observation, or NaN in it.
        """
        if masks is None:
            return self._fast(observation)
        return self._slow(observation, masks)

    def reset(self) -> None:
        """An episode begins; see :meth:`rlquant.deploy.runtime.Runtime.reset`."""
        self._states[...] = 0

    def act_batch(self, observations: Any, masks: Any = None, states: Floats | None = None) -> Array:
        """Actions ``[n, ...]`` for ``[n, *shape]``; see :meth:`rlquant.deploy.runtime.Runtime.act_batch`."""
        return self._run_batch(observations, masks, states)[0]

    def outputs(self, observations: Any, states: Floats | None = None) -> Floats:
        """float32 ``[n, outputs]`` for ``[n, *shape]``; see :meth:`rlquant.deploy.runtime.Runtime.outputs`."""
        return self._run_batch(observations, None, states)[1]

    def _run_batch(self, observations: Any, masks: Any, states: Floats | None) -> tuple[Array, Floats]:
        """Actions and outputs."""
        flat = flattened(self.program, observations)
        states = checked_states(self.program, states, len(flat))
        actions = np.empty((len(flat), *self._action[1]), self._action[0])
        outputs = np.empty((len(flat), self.program.head.outputs), np.float32)
        self._call(flat, masks, actions, outputs, states)
        return actions, outputs

    def _prepare(self) -> None:
        """An observation and an action whose addresses never change, so that a call converts no argument."""
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self.program.inputs.values()]
        flat = np.empty(sum(sizes), np.float32)
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        shapes = self.program.inputs.items()
        self._views = {key: part.reshape(shape) for (key, shape), part in zip(shapes, parts, strict=True)}
        self._one = np.empty(self._action[1], self._action[0])
        arrays = (self.constants, self._memory, flat, None, self._one, None, self._states)
        pointers = [ctypes.c_void_p(None if x is None else x.ctypes.data) for x in arrays]
        self._arguments = (*pointers, ctypes.c_int64(1))

    def _prepared(self, observation: Any) -> Any:
        """:meth:`act` through ctypes: for dicts, and where the extension module is missing."""
        given = observation if type(observation) is dict else {"": observation}
        if len(given) != len(self._views):
            return self._slow(observation)
        with np.errstate(over="ignore"):
            for key, view in self._views.items():
                part = given.get(key)
                if type(part) is not np.ndarray or part.shape != view.shape or part.dtype.kind not in "fiub":
                    return self._slow(observation)
                view[...] = part
        if self._run(*self._arguments):
            return self._slow(observation)
        return self._one.copy()[()]

    def _slow(self, observation: Any, masks: Any = None) -> Any:
        flat = flattened(self.program, observation, batch=False)
        actions = np.empty((1, *self._action[1]), self._action[0])
        self._call(flat, masks, actions, None, self._states)
        return actions[0]

    def _call(
        self, flat: Array, masks: Any, actions: Array, outputs: Array | None, states: Array | None
    ) -> None:
        allowed = None
        if masks is not None:
            allowed = np.ascontiguousarray(masks, np.bool_)
            if allowed.size != len(flat) * self.program.head.outputs:
                raise InputError(
                    f"expected masks of {self.program.head.outputs} choices for each observation, got {allowed.shape}"
                )
        arrays = (self.constants, self._memory, flat, allowed, actions, outputs, states)
        bad = self._run(*(None if x is None else x.ctypes.data for x in arrays), len(flat))
        if bad:
            raise InputError(f"the observation at index {bad - 1} holds NaN")


def native_source(program: Program) -> tuple[str, Array, str]:
    """The source of a program, the block of constants that it reads, and the C type of its actions."""
    block, memory = Block(), layout(program, margin=True)
    parts = generate(program, block, VectorProducts(program, block), FloatNumbers(program, block), memory)
    size = sum(program.buffers[i].size for i in range(len(program.inputs)))
    fields = {
        "MEMORY": parts.memory,
        "HELPERS": parts.helpers,
        "COMPUTE": parts.compute,
        "DECIDE": parts.decide,
        "OUTPUT": parts.output,
        "ACTION": parts.action,
        "OBSERVATION_SIZE": str(size),
        "OUTPUT_SIZE": str(program.head.outputs),
        "ACTION_SIZE": str(program.head.size),
        "STATE_SIZE": str(program.state_size),
    }
    text = kernel_text("native.c")
    for name, value in fields.items():
        text = text.replace(f"@{name}@", value)
    return kernel_text("vector.h") + text, block.memory(), parts.action


def _aligned(size: int) -> Array:
    room = np.zeros(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + size]


@memoize
def caller_module(cache: Path | None) -> Any:
    """The extension module that calls a policy, or None where it cannot be built."""
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").exists():
        warnings.warn(
            f"{include}/Python.h is missing, so each call of the runtime native takes a few microseconds longer: "
            "install Python's headers (python3-dev)",
            stacklevel=3,
        )
        return None
    flags = (*NATIVE_FLAGS, f"-I{include}", f"-I{np.get_include()}")
    path = shared_library(kernel_text("caller.c"), cache, flags)
    spec = importlib.util.spec_from_loader("rlquant_caller", ExtensionFileLoader("rlquant_caller", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
