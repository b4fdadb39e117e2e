"""Real numbers of a generated policy as float32, one rounded operation after the other."""

from __future__ import annotations

import numpy as np

from rlquant.deploy.c_constants import Constants
from rlquant.deploy.c_memory import c_type
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import Affine, Linear, OneHot, Program

__all__ = ["FloatNumbers", "grid_lines"]


class FloatNumbers:
    """See :class:`~rlquant.deploy.c_source.Numbers` and :class:`~rlquant.deploy.c_plain.Scaling`."""

    def __init__(self, program: Program, constants: Constants) -> None:
        self._program = program
        self._constants = constants

    def affine(self, op: Affine, name: str, at: str) -> list[str]:
        """Statements from ``x[at]`` to ``y[i]``."""

        def entry(part: str) -> str:
            values = getattr(op, part)
            if len(values) == 1:
                return self._constants.number(f"{part}{name}", values[0])
            return f"{self._constants.array(f'{part}{name}', values)}[i]"

        to_float = self._program.buffers[op.target].is_float
        gain, offset = entry("gain"), entry("offset")
        lines = [f"rounded v = (float)x[{at}];", f"v = v * {gain};", f"v = v + {offset};"]
        if not to_float or np.isfinite(op.low).any() or np.isfinite(op.high).any():
            lines.append(f"v = clampf(v, {entry('low')}, {entry('high')});")
        return [*lines, "y[i] = v;" if to_float else "y[i] = round_even(v);"]

    def hot(self, op: OneHot, name: str, at: str) -> list[str]:
        """Statements from ``x[at]`` to ``y[i]``."""
        value = self._constants.array(f"value{name}", op.value)
        return [f"y[i] = x[{at}] == {value}[i] ? 1.0f : 0.0f;"]

    def box(self, head: ProgramHead) -> list[str]:
        """Statements from ``y[i]`` to ``action[i]``."""
        assert head.low is not None
        assert head.high is not None
        low = f"{self._constants.array('action_low', head.low)}[i]"
        if head.kind == "clip":
            high = f"{self._constants.array('action_high', head.high)}[i]"
            return [f"action[i] = clampf(y[i], {low}, {high});"]
        span = f"{self._constants.array('action_span', head.high - head.low)}[i]"
        squashed = "tanh32(y[i])" if head.kind == "tanh" else "y[i]"
        steps = [f"rounded v = {squashed};", "v = v + 1.0f;", "v = 0.5f * v;", f"v = v * {span};"]
        return [*steps, f"v = {low} + v;", "action[i] = v;"]

    def limits(self, op: Linear, name: str) -> list[str]:
        """What :meth:`value` needs."""
        return [] if self._program.buffers[op.target].is_float else grid_lines(op, name, self._constants)

    def total(self) -> str:
        """Declares the sum over groups."""
        return "rounded total = 0.0f;"

    def add(self, op: Linear, name: str, entry: str) -> list[str]:
        """Statements that add ``sum``, of one group, to ``total``."""
        lines = ["rounded part = (float)sum;"]
        if op.weight.bits != 32:
            lines.append(f"part = part * {self._constants.array(f'gain{name}', op.gain)}[{entry}];")
        one = op.gain.shape[1] == 1
        return [*lines, "total = part;" if one else "total = group == 0 ? part : total + part;"]

    def finish(self, op: Linear, name: str) -> list[str]:
        """Statements after the last group."""
        return [f"total = total + {self._constants.array(f'bias{name}', op.bias)}[row];"]

    def value(self, op: Linear) -> str:
        """What is written."""
        target = self._program.buffers[op.target]
        if target.is_float:
            return "total"
        return f"({c_type(target)})(round_even(clampf(total, low, high)) + zero)"


def grid_lines(op: Linear, name: str, constants: Constants) -> list[str]:
    """Declares ``low``, ``high`` and ``zero``, within which a result is rounded."""
    return [
        f"const float low = {constants.number(f'low{name}', op.low - op.zero)};",
        f"const float high = {constants.number(f'high{name}', op.high - op.zero)};",
        f"const int32_t zero = (int32_t){constants.number(f'zero{name}', op.zero)};",
    ]
