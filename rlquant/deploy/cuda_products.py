"""Matrix products and convolutions of a program in Triton: the text of their loops, and their numbers.

Integer products run on tensor cores: int8 times int8 into int32. A grid's integers have 128 taken off, which the
correction of the zero point gives back; grids and weights of more bits are split into bytes. int32 wraps around on
the way, and the sum itself fits, so it is exact. Float products add up in float32, without tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy.cuda_constants import DeviceBlocks, digits, power_of_two, spread
from rlquant.deploy.program import Conv2d, Linear, Program

__all__ = [
    "WIDEST",
    "Shape",
    "indented",
    "looped",
    "multiply_line",
    "patch_lines",
    "position_lines",
    "shape_of",
    "store",
    "sum_lines",
]

Array = NDArray[Any]

WIDEST = 128
"""Columns of the widest block, in registers or of a loop."""


@dataclass(frozen=True)
class Shape:
    """How a product is cut.

    Attributes:
        floats: whether its source is float32; one group then, scales and weights multiplied beforehand.
        blocks: of output rows, each on its own part of the source (a convolution's groups).
        each: output rows of a block; ``room``: with padding.
        columns: of the result that are made at once.
        groups, group: how many groups of source columns, and columns of one; ``span``: with padding.
        step: columns of a group that are multiplied at once.
    """

    floats: bool
    blocks: int
    each: int
    room: int
    columns: int
    groups: int
    group: int
    span: int
    step: int

    def laid_out(self, values: Array) -> Array:
        """``[blocks * room, ...]`` of ``[rows, ...]``."""
        parts = values.reshape(self.blocks, self.each, -1)
        padding = ((0, 0), (0, self.room - self.each), (0, 0))
        return np.pad(parts, padding).reshape(self.blocks * self.room, -1)


def indented(lines: list[str]) -> list[str]:
    """One level deeper."""
    return [f"    {line}" for line in lines]


def looped(name: str, stop: int, step: int, lines: list[str]) -> list[str]:
    """Statements for ``name`` from 0 to ``stop``; without a loop where one turn is all."""
    if stop <= step:
        return [f"{name} = 0", *lines]
    return [f"for {name} in range(0, {stop}, {step}):", *indented(lines)]


def shape_of(program: Program, op: Linear, *, columns: int, block: int | None) -> Shape:
    """How to cut a product.

    Args:
        columns: of the result that are made at once.
        block: columns of one of the blocks in registers that the source comes in; None where it lies in memory.
    """
    floats, blocks = program.buffers[op.source].is_float, getattr(op, "blocks", 1)
    each = op.weight.rows // blocks
    group = op.weight.columns if floats or block else min(op.group, op.weight.columns)
    step = block or min(WIDEST, power_of_two(group))
    span = -(-group // step) * step
    groups = -(-op.weight.columns // group)
    return Shape(floats, blocks, each, -(-each // columns) * columns, columns, groups, group, span, step)


@dataclass(frozen=True)
class Stored:
    """Where a product's weights begin among the constants, and their int8 digits to the base 256.

    Attributes:
        start: index of the first one, of float32 or of int8.
        digits: of each weight, 0 for float32; ``size``: numbers of one digit of all weights.
    """

    start: int
    digits: int = 0
    size: int = 0


def store(op: Linear, shape: Shape, constants: DeviceBlocks) -> Stored:
    """Lays out a product's weights, with zeros between what is multiplied at once."""
    if shape.floats:
        scales = np.repeat(op.gain, op.group, axis=1)[:, : op.weight.columns]
        weights = spread(op.weight.values.astype(np.float32) * scales, shape.group, shape.span)
        return Stored(constants.add(shape.laid_out(weights)))
    codes = digits(spread(op.weight.values, shape.group, shape.span))
    planes = np.stack([shape.laid_out(plane) for plane in codes])
    return Stored(constants.add(planes), len(planes), planes[0].size)


def multiply_line(shape: Shape, stored: Stored, planes: int) -> str:
    """A statement that adds the product of ``{x}`` and weights from column ``{first}`` on to ``acc``.

    Args:
        planes: bytes of the source's integers.
    """
    total = shape.groups * shape.span
    if shape.floats:
        return f"acc = accumulate_floats(acc, {{x}}, floats + {stored.start}, units, {{first}}, {total})"
    counts = f"{stored.size}, {planes}, {stored.digits}"
    return f"acc = accumulate(acc, {{x}}, codes + {stored.start}, units, {{first}}, {total}, {counts})"


def sum_lines(
    op: Linear,
    shape: Shape,
    constants: DeviceBlocks,
    multiply: str,
    source: list[str],
    rows: str,
    planes: int,
) -> list[str]:
    """Statements from the source to float32 ``y [rows, columns]``, its bias added.

    Before them, ``units`` has to be the rows of the weight that make the ``columns``.

    Args:
        multiply: adds the product of ``{x}`` and weights to ``acc``, from column ``{first}`` or block ``{number}`` on.
        source: names of its blocks in registers; or statements that set ``x`` to the source's columns ``column``,
            of which those where ``used`` count.
        rows: of ``x``.
        planes: bytes of the source's integers.
    """
    one = [f"acc = tl.zeros([{rows}, {shape.columns}], tl.{'float32' if shape.floats else 'int32'})"]
    if source[0].isidentifier():
        one += [multiply.format(x=x, first=i * shape.step, number=i) for i, x in enumerate(source)]
    else:
        step = f"{shape.step}" if not shape.floats or shape.step < WIDEST else "FLOAT_STEP"
        chunk = [
            f"k = step + tl.arange(0, {step})",
            f"column = group * {shape.group} + k",
            f"used = (k < {shape.group}) & (column < {op.weight.columns})",
            *source,
            multiply.format(x="x", first=f"group * {shape.span} + step"),
        ]
        one += [f"for step in range(0, {shape.span}, {step}):", *indented(chunk)]
    one += _scale_lines(op, shape, constants, planes)
    if shape.groups > 1:
        zeros = f"total = tl.zeros([{rows}, {shape.columns}], tl.float32)"
        one.append("total = tl.where(group == 0, part, total + part)")
        every = [zeros, *looped("group", shape.groups, 1, one)]
    else:
        every = ["group = 0", *one, "total = part"]
    bias = constants.add(shape.laid_out(op.bias.astype(np.float32)))
    return [*every, f"y = total + tl.load(floats + {bias} + units)[None, :]"]


def _scale_lines(op: Linear, shape: Shape, constants: DeviceBlocks, planes: int) -> list[str]:
    """Statements from ``acc``, the sums of a group, to float32 ``part``."""
    if shape.floats:
        return ["part = acc"]
    corrections = constants.add(shape.laid_out(_corrections(op, planes)).T)
    gain = constants.add(shape.laid_out(op.gain).T)
    at = f"group * {shape.blocks * shape.room} + units"
    return [
        f"acc += tl.load(ints + {corrections} + {at})[None, :]",
        f"part = acc.to(tl.float32) * tl.load(floats + {gain} + {at})[None, :]",
    ]


def _corrections(op: Linear, planes: int) -> Array:
    """int32 ``[rows, groups]``: :attr:`Linear.corrections`, and what 128 less in each byte takes away."""
    less = sum(128 << (8 * i) for i in range(planes))
    sums = np.add.reduceat(
        op.weight.values.astype(np.int64), np.arange(0, op.weight.columns, op.group), axis=1
    )
    wrapped: Array = ((op.corrections + less * sums) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    return wrapped


def position_lines(op: Conv2d, count: int) -> list[str]:
    """Statements that set ``top`` and ``left``, where the patches of ``count`` positions from ``place`` on begin."""
    width = op.out_size[1]
    return [
        f"positions = place + tl.arange(0, {count})",
        f"top = (positions // {width} * {op.stride[0]} - {op.padding[0]})[:, None]",
        f"left = (positions % {width} * {op.stride[1]} - {op.padding[1]})[:, None]",
    ]


def patch_lines(op: Conv2d, source: str, outside: str) -> list[str]:
    """Statements that set ``x`` to some columns of patches, of the image that begins at ``source``."""
    channels, height, width = op.image
    rows, columns = op.kernel
    channel = f"block * {channels // op.blocks} + column // {rows * columns}"
    return [
        f"down = top + (column // {columns} % {rows} * {op.dilation[0]})[None, :]",
        f"across = left + (column % {columns} * {op.dilation[1]})[None, :]",
        f"inside = used[None, :] & (down >= 0) & (down < {height}) & (across >= 0) & (across < {width})",
        f"pixel = ({channel})[None, :] * {height * width} + down * {width} + across",
        f"x = tl.load({source} + pixel, mask=inside, other={outside})",
    ]
