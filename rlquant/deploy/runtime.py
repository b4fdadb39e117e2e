"""What runs a program. All runtimes give the same bits for integer programs; they differ in speed and in needs."""

from __future__ import annotations

from importlib import import_module
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy import reference
from rlquant.deploy.program import Program
from rlquant.errors import InputError, unknown_name

__all__ = [
    "RUNTIMES",
    "ReferenceRuntime",
    "Runtime",
    "checked",
    "checked_states",
    "flattened",
    "make_runtime",
]

Array = NDArray[Any]
Floats = NDArray[np.float32]
Observation = Any  # an array, or a dict of arrays by key

_CLASSES = {
    "native": "rlquant.deploy.native:NativeRuntime",
    "onnx": "rlquant.deploy.onnx_runtime:OnnxRuntime",
    "reference": "rlquant.deploy.runtime:ReferenceRuntime",
    "cuda": "rlquant.deploy.cuda:CudaRuntime",
}
RUNTIMES = tuple(_CLASSES)
"""From the fastest to the slowest; ``cuda``, which needs a GPU, comes last."""


class Runtime(Protocol):
    """Runs one program.

    A program with memory (an LSTM or GRU) remembers from one :meth:`act` to the next; :meth:`reset` begins an episode.
    Batches bring their memory along: ``states``, float32 ``[n, state_size]``, zeros where an episode begins, which
    the call replaces by what it remembers then; None for zeros that nobody needs afterwards.
    """

    name: str
    program: Program

    def reset(self) -> None:
        """An episode begins: forget the last one."""

    def act(self, observation: Observation, masks: Array | None = None) -> Array:
        """The action for one observation.

        Args:
            observation: ``[*shape]`` as the environment shows it (by key for a Dict), frames stacked.
            masks: bool ``[outputs]``; False forbids a choice.

        Raises:
            InputError: a wrong shape, or NaN.
        """

    def act_batch(
        self, observations: Observation, masks: Array | None = None, states: Floats | None = None
    ) -> Array:
        """Actions for ``[n, *shape]``."""

    def outputs(self, observations: Observation, states: Floats | None = None) -> Floats:
        """Head outputs float32 ``[n, outputs]``."""


def make_runtime(name: str, program: Program) -> Runtime:
    """The runtime called ``name``. Raises InputError where it is unknown or lacks what it needs."""
    if name not in _CLASSES:
        raise unknown_name("runtime", name, (*RUNTIMES, "torch"))
    module, _, cls = _CLASSES[name].partition(":")
    runtime: Runtime = getattr(import_module(module), cls)(program)
    return runtime


def checked(program: Program, observations: Observation, *, batch: bool = True) -> dict[str, Array]:
    """Observations by key, of the right shape and without NaN.

    Raises:
        InputError: a missing key, a wrong shape, no number, or NaN.
    """
    parts = observations if isinstance(observations, dict) else {"": observations}
    if set(parts) != set(program.inputs):
        raise InputError(
            f"the observation has the keys {sorted(parts)}; this policy takes {sorted(program.inputs)}"
        )
    arrays = {key: np.asarray(parts[key]) for key in program.inputs}
    for key, shape in program.inputs.items():
        given = arrays[key].shape[1:] if batch else arrays[key].shape
        what = f"observation {key!r}" if key else "the observation"
        if given != shape or (batch and arrays[key].ndim == 0):
            expected = f"[n, {', '.join(map(str, shape))}]" if batch else str(list(shape))
            raise InputError(f"{what} has the shape {list(arrays[key].shape)}; this policy takes {expected}")
        if arrays[key].dtype.kind not in "biuf":
            raise InputError(f"{what} has the dtype {arrays[key].dtype}; this policy takes numbers")
        if arrays[key].dtype.kind == "f" and np.isnan(arrays[key]).any():
            raise InputError(f"{what} holds NaN; no action was taken")
    return arrays


def flattened(program: Program, observations: Observation, *, batch: bool = True) -> Floats:
    """Observations float32 ``[n, size]``, all keys side by side; one row where ``batch`` is False.

    Raises:
        InputError: as :func:`checked`; or keys that differ in observations.
    """
    given = checked(program, observations, batch=batch)
    if batch and len({len(part) for part in given.values()}) > 1:
        raise InputError(f"the keys differ in observations: { {key: len(x) for key, x in given.items()} }")
    rows = len(next(iter(given.values()))) if batch else 1
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and saturates
        parts = [
            part.reshape(rows, prod(program.inputs[key])).astype(np.float32, copy=False)
            for key, part in given.items()
        ]
    return np.ascontiguousarray(np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])


def checked_states(program: Program, states: Floats | None, rows: int) -> Floats | None:
    """``states`` as :class:`Runtime` takes them, zeros for None; None where the program remembers nothing.

    Raises:
        InputError: another type or shape, or an array that cannot be written to in place.
    """
    if states is None:
        return np.zeros((rows, program.state_size), np.float32) if program.states else None
    wanted = (rows, program.state_size)
    fits = isinstance(states, np.ndarray) and states.shape == wanted and states.dtype == np.float32
    if not fits or not states.flags.c_contiguous or not states.flags.writeable:
        given = f"{getattr(states, 'dtype', type(states).__name__)} {list(np.shape(states))}"
        raise InputError(f"states are a contiguous, writable float32 array {list(wanted)}, not {given}")
    return states if program.states else None


class ReferenceRuntime:
    """The NumPy interpreter, see :mod:`~rlquant.deploy.reference`."""

    name = "reference"

    def __init__(self, program: Program) -> None:
        self.program = program
        self.reset()

    def reset(self) -> None:
        """See :meth:`Runtime.reset`."""
        self._states = np.zeros((1, self.program.state_size), np.float32)

    def act(self, observation: Observation, masks: Array | None = None) -> Array:
        """See :meth:`Runtime.act`."""
        parts = checked(self.program, observation, batch=False)
        outputs = reference.run(self.program, {key: x[None] for key, x in parts.items()}, self._states)
        action: Array = self.program.head(outputs, None if masks is None else masks[None])[0]
        return action

    def act_batch(
        self, observations: Observation, masks: Array | None = None, states: Floats | None = None
    ) -> Array:
        """See :meth:`Runtime.act_batch`."""
        return self.program.head(self.outputs(observations, states), masks)

    def outputs(self, observations: Observation, states: Floats | None = None) -> Floats:
        """See :meth:`Runtime.outputs`."""
        parts = checked(self.program, observations)
        rows = len(next(iter(parts.values())))
        return reference.run(self.program, parts, checked_states(self.program, states, rows))
