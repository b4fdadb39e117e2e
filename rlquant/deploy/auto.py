"""The fastest runtime that runs a program right: what the runtime ``auto`` stands for.

Runtimes are tried in the order of :data:`~rlquant.deploy.runtime.RUNTIMES`. Nothing is timed: a busy machine
must not change the choice, and with it a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.program import Activate, Program
from rlquant.deploy.runtime import RUNTIMES, make_runtime
from rlquant.errors import InputError

__all__ = ["AUTOMATIC", "Choice", "choose_runtime"]

Array = NDArray[Any]

AUTOMATIC = (*(name for name in RUNTIMES if name not in ("cuda", "reference")), "reference")
"""What ``auto`` may take: a GPU is only used where somebody asks for it; the reference where nothing else is right."""

_EXACT_ACTIVATIONS = ("ReLU", "Tanh")
_TOLERANCE = 1e-4  # of the largest output
_AGREEING_ROWS = 0.95  # a float before a grid may round to the next step, which moves one row by much more


@dataclass(frozen=True)
class Choice:
    """A runtime.

    Attributes:
        name: of the runtime.
        passed_over: why each faster one was not taken.
    """

    name: str
    passed_over: tuple[str, ...] = ()


def choose_runtime(
    program: Program, observations: dict[str, Array], *, make: Callable[[str, Program], Any] = make_runtime
) -> Choice:
    """The first runtime that can run a program and agrees with the reference.

    Programs of integers have to agree in every bit of their outputs, others to within float rounding.

    Args:
        program: what will run.
        observations: ``[n, *shape]`` by key, frames stacked, as a policy meets them one after the other.
        make: makes a runtime of a program by name.
    """
    expected = _outputs(make("reference", program), program, observations)
    reasons: list[str] = []
    for name in AUTOMATIC[:-1]:
        try:
            found = _outputs(make(name, program), program, observations)
        except InputError as error:
            reasons.append(f"{name} is passed over: {error}")
            continue
        wrong = _difference(program, expected, found)
        if wrong is None:
            return Choice(name, tuple(reasons))
        reasons.append(f"{name} is passed over: {wrong}")
    return Choice(AUTOMATIC[-1], tuple(reasons))


def _outputs(runtime: Any, program: Program, observations: dict[str, Array]) -> Array:
    """Head outputs float32 ``[n, outputs]``; a program with memory takes one step after the other."""
    if not program.states:
        return np.asarray(runtime.outputs(observations))
    states = np.zeros((1, program.state_size), np.float32)
    count = len(next(iter(observations.values())))
    steps = [{key: x[i : i + 1] for key, x in observations.items()} for i in range(count)]
    return np.concatenate([runtime.outputs(step, states) for step in steps])


def _difference(program: Program, expected: Array, found: Array) -> str | None:
    """What is wrong with outputs, or None."""
    if _is_exact(program):
        unequal = (expected.view(np.int32) != found.view(np.int32)).any(axis=1)
        if not unequal.any():
            return None
        return f"its outputs are not the reference's bits for {unequal.sum()} of {len(found)} observations"
    scale = float(np.abs(expected).max(initial=0.0))
    with np.errstate(invalid="ignore"):  # infinite outputs
        apart = (np.abs(expected - found) > _TOLERANCE * scale) & (expected != found)
    rows = (apart | np.isnan(found)).any(axis=1)
    grids = any(not buffer.is_float for buffer in program.buffers)
    if rows.sum() <= (1 - _AGREEING_ROWS) * len(rows) * grids:
        return None
    return f"its outputs differ from the reference's by more than rounding for {rows.sum()} of {len(rows)} observations"


def _is_exact(program: Program) -> bool:
    """Whether every runtime computes the same bits."""
    kinds = {op.kind for op in program.ops if isinstance(op, Activate)}
    return program.is_integer and kinds <= set(_EXACT_ACTIVATIONS)
