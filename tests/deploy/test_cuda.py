"""Programs on a GPU give the reference's bits; without a GPU, Triton's interpreter runs the same kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_programs import memories, observations, programs

from rlquant.deploy import reference
from rlquant.deploy.cuda import CudaRuntime
from rlquant.deploy.program import Program

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),  # of the interpreter, on extremes
    pytest.mark.filterwarnings("ignore:invalid:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide:RuntimeWarning"),
]
hypothesis_settings = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def shown(x: dict[str, np.ndarray]) -> Any:
    return x[""] if set(x) == {""} else x


def assert_same_bits(given: np.ndarray, expected: np.ndarray) -> None:
    assert given.dtype == expected.dtype
    np.testing.assert_array_equal(given.view(np.int32), expected.view(np.int32))


@hypothesis_settings
@given(programs())
def test_any_program_gives_the_bits_of_the_reference(program: Program) -> None:
    x = observations(program, 200)
    states, after = memories(program, 200), memories(program, 200)
    expected = reference.run(program, x, states)
    runtime = CudaRuntime(program, device=DEVICE)
    assert_same_bits(runtime.outputs(shown(x), after if program.states else None), expected)
    assert_same_bits(after, states)
