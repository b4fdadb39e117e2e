"""Real numbers of a generated policy in fixed point, for chips without an FPU.

A real number is an int32 in units of ``2**-fraction``; a gain and an offset become ``(x * multiplier + offset) >>
shift`` in 64 bits with as many bits as fit. Results equal the float ones but where those lie within the multiplier's
precision of a half (Jacob et al. 2018, arXiv:1712.05877, section 2.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.c_constants import Constants
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import Activate, Affine, Gates, Linear, OneHot, Program

__all__ = ["ACTION_FRACTION", "FixedNumbers", "fits_fixed_point"]

Array = NDArray[Any]
ACTION_FRACTION = 16
_LARGEST = 2**31 - 1
_MOST_FRACTION = 24
_TANH_STEP = 11  # bits of the argument between two entries of the table: 1/32


def fits_fixed_point(program: Program) -> bool:
    """Whether integers can run it: no product, activation or cell works on floats."""
    return program.is_integer and not any(isinstance(op, Activate | Gates) for op in program.ops)


class FixedNumbers:
    """See :class:`~rlquant.deploy.c_source.Numbers` and :class:`~rlquant.deploy.c_plain.Scaling`.

    Attributes:
        fractions: bits after the point, of each buffer of reals; 0 for grids.
    """

    def __init__(self, program: Program, constants: Constants) -> None:
        self._program = program
        self._constants = constants
        self.fractions = _fractions(program)

    def affine(self, op: Affine, name: str, at: str) -> list[str]:
        """Statements from ``x[at]`` to ``y[i]``."""
        entry = self._scale(op, name, op.gain, op.offset)
        unit = 2.0 ** self.fractions[op.target]
        top = 2.0 ** self._program.buffers[op.target].bits - 1
        limits = (-_LARGEST, _LARGEST) if self._program.buffers[op.target].is_float else (0, top)
        low, high = (np.clip(np.rint(x.astype(np.float64) * unit), *limits) for x in (op.low, op.high))
        bounds = [
            self._entry(f"{part}{name}", x.astype(np.int32)) for part, x in (("low", low), ("high", high))
        ]
        multiplier, offset, shift = (text.replace("[row]", "[i]") for text in entry)
        total = f"(int64_t)x[{at}] * {multiplier} + {offset}"
        return [f"y[i] = shifted({total}, {shift}, {', '.join(bounds)});"]

    def hot(self, op: OneHot, name: str, at: str) -> list[str]:
        """Statements from ``x[at]`` to ``y[i]``."""
        units = np.rint(op.value.astype(np.float64) * 2.0 ** self.fractions[op.source])
        value = self._constants.array(f"value{name}", np.clip(units, -_LARGEST, _LARGEST).astype(np.int32))
        return [f"y[i] = x[{at}] == {value}[i] ? {2 ** self.fractions[op.target]} : 0;"]

    def box(self, head: ProgramHead) -> list[str]:
        """Statements from ``y[i]`` to ``action[i]``, an int32 in units of ``2**-16``."""
        assert head.low is not None
        assert head.high is not None
        more = self.fractions[self._program.output] - ACTION_FRACTION
        lines = [f"int64_t v = y[i]{f' / {2**more}' if more > 0 else f' * (int64_t){2**-more}'};"]
        low, high = (
            np.clip(np.rint(x.astype(np.float64) * 65536), -_LARGEST, _LARGEST) for x in (head.low, head.high)
        )
        start = self._constants.array("action_low", low.astype(np.int32))
        if head.kind == "clip":
            end = self._constants.array("action_high", high.astype(np.int32))
            return [*lines, f"action[i] = shifted(v, 0, {start}[i], {end}[i]);"]
        if head.kind == "tanh":
            lines += self._tanh()
        span = self._constants.array("action_span", (high - low).astype(np.int64))
        lines.append(f"v = ((v + 65536) * {span}[i] >> 17) + {start}[i];")
        return [*lines, f"action[i] = shifted(v, 0, -{_LARGEST}, {_LARGEST});"]

    def limits(self, op: Linear, name: str) -> list[str]:
        """Declares ``low`` and ``high``."""
        if self._program.buffers[op.target].is_float:
            return [f"const int32_t low = -{_LARGEST}, high = {_LARGEST};"]
        return [f"const int32_t low = {op.low}, high = {op.high};"]

    def total(self) -> str:
        """Declares the sum over groups."""
        return "int64_t total = 0;"

    def add(self, op: Linear, name: str, entry: str) -> list[str]:
        """Statements that add ``sum``, of one group, to ``total``."""
        multiplier, _, _ = self._scale(op, name, op.gain, op.bias + np.float32(op.zero))
        return [f"total += (int64_t)sum * {multiplier.replace('[row]', f'[{entry}]')};"]

    def finish(self, op: Linear, name: str) -> list[str]:
        """Statements after the last group."""
        _, offset, shift = self._scale(op, name, op.gain, op.bias + np.float32(op.zero))
        return [f"total = shifted(total + {offset}, {shift}, low, high);"]

    def value(self, op: Linear) -> str:
        """What is written."""
        return "(int32_t)total"

    def _scale(self, op: Affine | Linear, name: str, gain: Array, offset: Array) -> tuple[str, str, str]:
        """Expressions of multiplier, offset and shift in ``row``."""
        change = 2.0 ** (self.fractions[op.target] - self.fractions[op.source])
        size = max(len(gain), len(offset))
        gains = np.broadcast_to(gain.astype(np.float64).reshape(len(gain), -1) * change, (size, gain[0].size))
        offsets = np.broadcast_to(offset.astype(np.float64) * 2.0 ** self.fractions[op.target], size)
        room = np.minimum(29 - _bits(np.abs(gains).max(axis=1)), 60 - _bits(np.abs(offsets)))
        shifts = np.clip(room, 0, 60)
        multipliers = np.clip(np.rint(gains * 2.0 ** shifts[:, None]), -_LARGEST, _LARGEST).astype(np.int32)
        halves = np.where(shifts > 0, 2.0 ** (shifts - 1), 0)
        whole = np.clip(np.rint(offsets * 2.0**shifts) + halves, -(2.0**61), 2.0**61).astype(np.int64)
        if multipliers.size > 1:
            return (
                f"{self._constants.array(f'multiplier{name}', multipliers)}[row]",
                f"{self._constants.array(f'offset{name}', whole)}[row]",
                f"{self._constants.array(f'shift{name}', shifts.astype(np.uint8))}[row]",
            )
        return str(multipliers[0, 0]), f"{whole[0]}", str(int(shifts[0]))

    def _entry(self, name: str, values: Array) -> str:
        return str(values[0]) if len(values) == 1 else f"{self._constants.array(name, values)}[i]"

    def _tanh(self) -> list[str]:
        steps = np.arange(2 ** (19 - _TANH_STEP) + 2) * 2.0 ** (_TANH_STEP - 16)  # up to 8
        table = self._constants.array("tanh_table", np.rint(np.tanh(steps) * 65536).astype(np.int32))
        rest = 2**_TANH_STEP - 1
        return [
            "int32_t size = shifted(v < 0 ? -v : v, 0, 0, 524287), low = size >> " + f"{_TANH_STEP};",
            f"size = {table}[low] + ((({table}[low + 1] - {table}[low]) * (size & {rest})) >> {_TANH_STEP});",
            "v = v < 0 ? -size : size;",
        ]


def _bits(x: Array) -> Array:
    """Bits of the integer part, negative for fractions."""
    return np.ceil(np.log2(np.maximum(x, 2.0**-60))).astype(np.int64)


def _fractions(program: Program) -> list[int]:
    """As many bits after the point as the largest value leaves; of an input, the largest that makes a difference."""
    inputs = range(len(program.inputs))
    bounds = [0.0 if buffer.is_float else 2.0**buffer.bits - 1 for buffer in program.buffers]
    reach = [_saturates(op) for op in program.ops if isinstance(op, Affine) and op.source in inputs]
    reach += [float(np.abs(op.value).max()) + 1 for op in program.ops if isinstance(op, OneHot)]
    for index in inputs:
        bounds[index] = min(max(reach, default=32768.0), 2.0**22)
    for op in program.ops:
        if not program.buffers[op.target].is_float:
            continue
        if isinstance(op, OneHot):
            bounds[op.target] = max(bounds[op.target], 1.0)
        elif isinstance(op, Affine):
            linear = np.abs(op.gain) * bounds[op.source] + np.abs(op.offset)
            bound = np.minimum(linear, np.maximum(np.abs(op.low), np.abs(op.high))).max()
            bounds[op.target] = max(bounds[op.target], float(bound))
        elif isinstance(op, Linear):
            sums = np.abs(op.weight.values.astype(np.float64)).sum(axis=1) * bounds[op.source]
            bound = (sums * np.abs(op.gain).max(axis=1) + np.abs(op.bias)).max()
            bounds[op.target] = max(bounds[op.target], float(bound))
    fractions = [int(np.clip(30 - _bits(np.array(bound)), 0, _MOST_FRACTION)) for bound in bounds]
    return [f if buffer.is_float else 0 for f, buffer in zip(fractions, program.buffers, strict=True)]


def _saturates(op: Affine) -> float:
    """The absolute value from which on no larger input of a map changes its result."""
    gain, offset = op.gain.astype(np.float64), op.offset.astype(np.float64)
    with np.errstate(all="ignore"):
        ends = np.abs(np.concatenate([np.ravel((end - offset) / gain) for end in (op.low, op.high)]))
    return float(np.nan_to_num(ends, nan=32768.0, posinf=32768.0).max())
