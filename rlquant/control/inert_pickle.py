"""Reads the numbers out of a pickle without running any of its code.

A pickle is a program: ``GLOBAL`` names any callable and ``REDUCE`` calls it. Here the few names that SB3's
``vecnormalize.pkl`` holds are mapped to inert records and to array builders of our own, and every other name
is refused before anything is called, so the worst that a hostile file can do is to be rejected.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any, NoReturn

import numpy as np

from rlquant.errors import InputError

__all__ = ["Record", "read_pickle"]

_MAX_BYTES = 64 * 2**20  # a normaliser of a 4x84x84 image is under 1 MiB
_NUMERIC = set("biuf")


class Record:
    """An inert stand-in for an object: its state as a plain dict in ``state``, nothing else."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = (arguments, named)
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], dict):
            state = state[0]  # (dict, slots)
        if isinstance(state, dict):
            self.state = {str(key): value for key, value in state.items()}


class _Dtype:
    """A numeric dtype, checked; NumPy's own ``dtype`` would accept object arrays."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code = str(code)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order in "<>":
            self.code = order + self.code

    def build(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        if dtype.kind not in _NUMERIC:
            raise InputError(f"it holds an array of {dtype}, which is not numeric")
        return dtype


class _Array:
    """An array under construction: NumPy pickles an empty one and then sets (version, shape, dtype, order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.value = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(raw, bytes) or not isinstance(dtype, _Dtype):
            raise InputError("it holds an array that is not plain numbers")
        flat = np.frombuffer(raw, dtype.build())
        self.value = flat.reshape(shape, order="F" if fortran else "C").copy()


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype.build(), count=1)[0].item()


def _frombuffer(raw: bytes, dtype: _Dtype, shape: Any, order: Any) -> _Array:
    """Protocol 5 in-band arrays: ``numpy._core.numeric._frombuffer``."""
    array = _Array()
    array.value = np.frombuffer(raw, dtype.build()).reshape(shape, order=order).copy()
    return array


def _latin1(text: str, encoding: str) -> bytes:
    """Protocol 2 writes bytes as ``_codecs.encode(text, 'latin1')``."""
    return str(text).encode("latin1")


def _builders() -> dict[tuple[str, str], Any]:
    table: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("__builtin__", "set"): set,
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _Array,
        ("_codecs", "encode"): _latin1,
    }
    for core in ("numpy.core", "numpy._core"):
        table[core + ".multiarray", "_reconstruct"] = _Array
        table[core + ".multiarray", "scalar"] = _scalar
        table[core + ".numeric", "_frombuffer"] = _frombuffer
    for module, name in (
        ("stable_baselines3.common.vec_env.vec_normalize", "VecNormalize"),
        ("stable_baselines3.common.running_mean_std", "RunningMeanStd"),
        ("numpy.random._pickle", "__randomstate_ctor"),
        ("numpy.random._pickle", "__generator_ctor"),
        ("numpy.random._pickle", "__bit_generator_ctor"),
        ("numpy.random._pcg64", "PCG64"),
        ("numpy.random._mt19937", "MT19937"),
        ("numpy.random.bit_generator", "SeedSequence"),
        ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"),
    ):
        table[module, name] = Record
    for package in ("gym", "gymnasium"):
        for name in ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict"):
            kind = {"MultiDiscrete": "multi_discrete", "MultiBinary": "multi_binary"}.get(name, name.lower())
            table[f"{package}.spaces.{kind}", name] = Record
    return table


class _InertUnpickler(pickle.Unpickler):
    _table = _builders()

    def find_class(self, module: str, name: str) -> Any:
        found = self._table.get((module, name))
        if found is None:
            raise InputError(f"it asks to load {module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> NoReturn:
        raise InputError("it asks to load an external object")


def read_pickle(data: bytes, name: str) -> Any:
    """The inert content of a pickle: records, dicts and arrays.

    Args:
        data: the pickle.
        name: what to call it in a message.

    Raises:
        InputError: it names anything outside the allow-list, is truncated, or is too large; nothing ran.
    """
    if len(data) > _MAX_BYTES:
        raise InputError(f"{name} has {len(data):,} bytes; a normaliser has at most {_MAX_BYTES:,}")
    try:
        return _unwrap(_InertUnpickler(io.BytesIO(data)).load(), depth=0)
    except InputError as error:
        raise InputError(
            f"{name} was refused: {error}. Nothing was run. If you trust its author, repeat with --trust"
        ) from None
    except Exception as error:  # a damaged pickle can fail in any opcode; none of them ran foreign code
        raise InputError(f"{name} is damaged: {type(error).__name__}: {error}") from None


def _unwrap(value: Any, depth: int) -> Any:
    """Replace the array builders by their arrays."""
    if depth > 20:
        raise InputError("it nests too deep")
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, Record):
        value.state = {key: _unwrap(item, depth + 1) for key, item in value.state.items()}
    elif isinstance(value, dict):
        return {key: _unwrap(item, depth + 1) for key, item in value.items()}
    return value
