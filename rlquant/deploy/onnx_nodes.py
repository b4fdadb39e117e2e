"""Writes an ONNX graph node by node. onnx is imported where it is used: it is an optional package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.errors import missing_package

__all__ = ["IR_VERSION", "OPSET", "Graph"]

OPSET = 20
"""The first with Gelu; ONNX 1.15, ONNX Runtime 1.17."""

IR_VERSION = 9


class Graph:
    """Nodes and constants in the order in which they were asked for; equal constants are stored once.

    Raises:
        InputError: onnx is not installed.
    """

    def __init__(self) -> None:
        try:
            import onnx  # noqa: F401
        except ImportError:
            raise missing_package("onnx", "onnx", "an ONNX graph") from None
        self._nodes: list[Any] = []
        self._names = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], tuple[str, NDArray[Any]]] = {}

    def constant(self, values: Any, dtype: Any) -> str:
        """The name of a constant."""
        array = np.ascontiguousarray(np.asarray(values, dtype))
        array = array.reshape(np.shape(values))  # ascontiguousarray makes a vector of a scalar
        key = (array.dtype.str, array.shape, array.tobytes())
        return self._constants.setdefault(key, (f"/constant/{len(self._constants)}", array))[0]

    def node(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """The name of the result of one more node; ``name`` gives it one."""
        return self.nodes(kind, inputs, [name or f"/{kind}/{len(self._nodes)}"], **attributes)[0]

    def nodes(self, kind: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> list[str]:
        """As :meth:`node`, for a node of several results."""
        from onnx import helper

        self._nodes.append(helper.make_node(kind, list(inputs), list(names), **attributes))
        return list(names)

    def fresh(self, kind: str) -> str:
        """A name for one of several results."""
        self._names += 1
        return f"/{kind}/result/{self._names}"

    def cast(self, x: str, dtype: Any) -> str:
        """``x`` in another type."""
        return self.node("Cast", x, to=_element_type(dtype))

    def reshape(self, x: str, *shape: int, name: str | None = None) -> str:
        """``[batch, *shape]``."""
        return self.node("Reshape", x, self.constant([-1, *shape], np.int64), name=name)

    def model(
        self,
        inputs: Mapping[str, tuple[Any, tuple[int, ...]]],
        outputs: Mapping[str, tuple[Any, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> Any:
        """The finished ``onnx.ModelProto``, checked.

        Args:
            inputs: dtype and shape behind the batch dimension, by name.
            outputs: likewise.
            metadata: texts of the model's ``metadata_props``.
        """
        import onnx
        from onnx import helper, numpy_helper

        values = [
            [
                helper.make_tensor_value_info(name, _element_type(dtype), ["batch", *shape])
                for name, (dtype, shape) in described.items()
            ]
            for described in (inputs, outputs)
        ]
        constants = [numpy_helper.from_array(array, name) for name, array in self._constants.values()]
        graph = helper.make_graph(self._nodes, "policy", values[0], values[1], constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rlquant")
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model


def _element_type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
