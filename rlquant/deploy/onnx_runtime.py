"""Runs a program in ONNX Runtime on one CPU thread, and writes .onnx files.

ONNX Runtime's optimisations beyond ``basic`` may fuse ``MatMulInteger``, ``Cast`` and ``Mul`` into one kernel
with a fused multiply-add, which rounds once instead of twice; so integer programs run without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.onnx_graph import ACTION, NEXT_STATE, OUTPUTS, STATE, build_model, input_names
from rlquant.deploy.program import Program
from rlquant.deploy.runtime import Floats, Observation, checked, checked_states
from rlquant.errors import missing_package
from rlquant.runs import write_files

__all__ = ["OnnxRuntime", "export_onnx"]

Array = NDArray[Any]


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    masked: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a program as an ``.onnx`` file and return its bytes; see :mod:`~rlquant.deploy.onnx_graph`.

    Args:
        program: what to write.
        path: of the file; its folder is made if missing.
        masked: whether actions can be forbidden by an input ``masks``.
        metadata: texts for the model's metadata, such as the environment and the precision.

    Raises:
        InputError: onnx is not installed, ONNX lacks an operation, or the file cannot be written.
    """
    content = _serialized(build_model(program, masked=masked, metadata=metadata))
    write_files(Path(path).parent, {Path(path).name: content})
    return len(content)


class OnnxRuntime:
    """See :class:`rlquant.deploy.runtime.Runtime`.

    Raises:
        InputError: onnx or onnxruntime is not installed, or ONNX lacks an operation of the program.
    """

    name = "onnx"

    def __init__(self, program: Program) -> None:
        self.program = program
        self._names = input_names(program)
        self._session = _session(_serialized(build_model(program)), exact=program.is_integer)
        self._inputs = {
            key: np.zeros((1, *shape), np.float32) for key, shape in program.inputs.items()
        }  # of act; their addresses are bound once
        zeros = np.zeros((1, program.head.outputs), np.float32)
        self._outputs, self._action = zeros, program.head(zeros)
        self._binding = self._session.io_binding()
        for key, buffer in self._inputs.items():
            _bind(self._binding.bind_input, self._names[key], buffer)
        self._states, self._next_states = np.zeros((2, 1, program.state_size), np.float32)
        if program.states:
            _bind(self._binding.bind_input, STATE, self._states)
            _bind(self._binding.bind_output, NEXT_STATE, self._next_states)
        _bind(self._binding.bind_output, OUTPUTS, self._outputs)
        _bind(self._binding.bind_output, ACTION, self._action)

    def reset(self) -> None:
        """See :meth:`rlquant.deploy.runtime.Runtime.reset`."""
        self._states[...] = 0

    def act(self, observation: Observation, masks: Array | None = None) -> Array:
        """See :meth:`rlquant.deploy.runtime.Runtime.act`."""
        with np.errstate(over="ignore"):
            for key, x in checked(self.program, observation, batch=False).items():
                self._inputs[key][0] = x
        self._session.run_with_iobinding(self._binding)
        self._states[...] = self._next_states
        actions = self._action if masks is None else self.program.head(self._outputs, masks[None])
        action: Array = actions[0].copy()
        return action

    def act_batch(
        self, observations: Observation, masks: Array | None = None, states: Floats | None = None
    ) -> Array:
        """See :meth:`rlquant.deploy.runtime.Runtime.act_batch`."""
        if masks is not None:
            return self.program.head(self.outputs(observations, states), masks)
        return self._run(ACTION, observations, states)

    def outputs(self, observations: Observation, states: Floats | None = None) -> Floats:
        """See :meth:`rlquant.deploy.runtime.Runtime.outputs`."""
        return self._run(OUTPUTS, observations, states)

    def _run(self, wanted: str, observations: Observation, states: Floats | None) -> Array:
        with np.errstate(over="ignore"):
            feed = {
                self._names[key]: np.ascontiguousarray(x, np.float32)
                for key, x in checked(self.program, observations).items()
            }
        states = checked_states(self.program, states, len(next(iter(feed.values()))))
        if states is None:
            result: Array = self._session.run([wanted], feed)[0]
            return result
        result, states[...] = self._session.run([wanted, NEXT_STATE], feed | {STATE: states})
        return result


def _serialized(model: Any) -> bytes:
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _session(content: bytes, *, exact: bool) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise missing_package("onnxruntime", "onnx", "the runtime onnx") from None
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if exact else levels.ORT_ENABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _bind(bind: Any, name: str, buffer: Array) -> None:
    bind(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
