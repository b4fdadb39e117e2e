"""A program as C99 files for any chip: the policy, its header, a test vector and a program that checks it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlquant.deploy import reference
from rlquant.deploy.c_build import kernel_text
from rlquant.deploy.c_constants import Literals
from rlquant.deploy.c_fixed import ACTION_FRACTION, FixedNumbers, fits_fixed_point
from rlquant.deploy.c_floats import FloatNumbers
from rlquant.deploy.c_memory import layout
from rlquant.deploy.c_plain import PlainProducts, patch_sizes
from rlquant.deploy.c_source import CSource, generate
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import Program
from rlquant.runs import write_files

__all__ = ["TESTS", "c_files", "export_c", "test_observations"]

Array = NDArray[Any]
TESTS = 96
"""Observations of the test vector: the first half tame, the rest with extremes and infinities among them."""
_TAME = 160  # of the numbers that observations are drawn from
_FLOAT_TOLERANCE = 1e-4  # programs of floats agree up to the order of summation


def export_c(program: Program, folder: Path) -> list[Path]:
    """Writes ``policy.c``, ``policy.h``, ``policy_test.h`` and ``main.c`` and returns their paths."""
    files = c_files(program)
    write_files(folder, files)
    return [folder / name for name in files]


def c_files(program: Program) -> dict[str, str]:
    """The text of each file, by name."""
    memory = layout(program, real="policy_number")
    floats, integers = Literals(), Literals()
    plain = FloatNumbers(program, floats)
    source = generate(program, floats, PlainProducts(program, floats, plain), plain, memory)
    parts = {"FLOAT_PART": _part(source), "INTEGER_PART": ""}
    parts["INTEGER_SUPPORT"] = '#error "this policy computes in floats and cannot do with integers only"'
    if fits_fixed_point(program):
        fixed = FixedNumbers(program, integers)
        products = PlainProducts(program, integers, fixed)
        parts["INTEGER_PART"] = _part(generate(program, integers, products, fixed, memory))
        units = (fixed.fractions[0], fixed.fractions[program.output], _action_one(program.head))
        parts["INTEGER_SUPPORT"] = (
            "#define POLICY_FRACTION {0} /* an observation x is x * 2^{0}, limited to int32 */\n"
            "#define POLICY_OUTPUT_FRACTION {1}\n"
            "#define POLICY_ACTION_ONE {2} /* the action 1 */"
        ).format(*units)
    shared = {
        name: text for name, text in floats.definitions.items() if integers.definitions.get(name) == text
    }
    for name, literals in (("FLOAT_PART", floats), ("INTEGER_PART", integers)):
        own = [text for key, text in literals.definitions.items() if key not in shared]
        parts[name] = "\n".join(own) + parts[name]
    widths = {"float": 4, "uint8_t": 1, "uint16_t": 2}
    ram = (
        memory.nbytes
        + 4 * program.state_size
        + sum(widths[kind] * size for kind, size in patch_sizes(program).items())
    )
    text = "\n".join(floats.definitions.values()) + source.compute
    fields = _fields(program, source) | {
        "CONSTANTS": "\n".join(shared.values()),
        "FLASH": str(sum(floats.sizes.values())),
        "RAM": str(ram),
        "HASH": hashlib.sha256(text.encode()).hexdigest()[:16],
        "INTEGER_ACTION": "int32_t" if source.action == "float" else source.action,
    }
    names = ("policy.c", "policy.h", "main.c")
    files = {name: _filled(kernel_text(name), fields | parts) for name in names}
    return files | {"policy_test.h": _test_vector(program)}


def _part(source: CSource) -> str:
    """The functions that depend on how real numbers are computed with."""
    return f"""{source.helpers}

static void compute(policy_memory *memory, const policy_number *restrict observation)
{{
{source.compute}
}}

static void decide(const policy_number *y, policy_action *action)
{{
{source.decide}
}}"""


def _action_one(head: ProgramHead) -> int:
    return 2**ACTION_FRACTION if head.kind in ("clip", "tanh", "unscale") else 1


def test_observations(program: Program) -> tuple[Array, dict[str, Array]]:
    """The numbers that the test observations are made of, and the observations: float32 ``[TESTS, *shape]`` by key.

    ``main.c`` draws the same ones. For programs of floats all of them are tame.
    """
    generator = np.random.default_rng(0)
    tame = generator.normal(size=_TAME).astype(np.float32) * np.repeat([1, 3, 100, 0.1], _TAME // 4)
    wild = generator.normal(size=56) * 10.0 ** generator.uniform(-6, 6, 56)
    largest = np.finfo(np.float32).max
    extremes = [np.inf, -np.inf, largest, -largest, 0.0, -0.0, 255.0, 1e-40]
    numbers = np.concatenate([tame, *([wild, extremes] if program.is_integer else [])]).astype(np.float32)
    size = sum(program.buffers[i].size for i in range(len(program.inputs)))
    x: Array = np.arange(TESTS * size, dtype=np.uint32) * np.uint32(2654435761)
    x = (x ^ (x >> 15)) * np.uint32(2246822519)
    limits = np.repeat([_TAME, len(numbers)], TESTS * size // 2)
    flat = numbers[(x ^ (x >> 13)) % limits].reshape(TESTS, size)
    ends = np.cumsum([program.buffers[i].size for i in range(len(program.inputs))])[:-1]
    parts = np.split(flat, ends, axis=1)
    shapes = program.inputs.items()
    return numbers, {key: part.reshape(TESTS, *s) for (key, s), part in zip(shapes, parts, strict=True)}


def _test_vector(program: Program) -> str:
    numbers, observations = test_observations(program)
    outputs = _episode(program, observations)
    actions = program.head(outputs).reshape(TESTS, -1)
    literals = Literals()
    literals.array("test_numbers", numbers)
    literals.array("test_outputs", outputs)
    kept = actions.astype(np.int32) if actions.dtype == np.int64 else actions
    literals.array("test_actions", kept)
    tolerance = "0.0f" if program.is_integer else f"{_FLOAT_TOLERANCE}f"
    return "\n".join(
        [
            "/* What policy.c has to give, computed by rlquant's reference in NumPy. */",
            f"#define POLICY_TESTS {TESTS}",
            f"#define POLICY_TAME {_TAME}",
            f"#define POLICY_NUMBERS {len(numbers)}",
            f"#define POLICY_TOLERANCE {tolerance}",
            *literals.definitions.values(),
            "",
        ]
    )


def _episode(program: Program, observations: dict[str, Array]) -> NDArray[np.float32]:
    """Outputs of one step after the other, float32 ``[steps, outputs]``."""
    states = np.zeros((1, program.state_size), np.float32)
    steps = range(len(next(iter(observations.values()))))
    rows = ({key: x[step : step + 1] for key, x in observations.items()} for step in steps)
    return np.concatenate([reference.run(program, row, states) for row in rows])


def _fields(program: Program, source: CSource) -> dict[str, str]:
    size = sum(program.buffers[i].size for i in range(len(program.inputs)))
    return {
        **_state_fields(program.state_size),
        "TITLE": f"A policy ({program.name})" if program.name else "A policy",
        "MEMORY": source.memory,
        "OUTPUT": source.output,
        "ACTION": source.action,
        "OBSERVATION": _describe(program.inputs),
        "ACTION_TEXT": _describe_action(program.head),
        "OBSERVATION_SIZE": str(size),
        "OUTPUT_SIZE": str(program.head.outputs),
        "ACTION_SIZE": str(program.head.size),
    }


def _state_fields(size: int) -> dict[str, str]:
    """What a policy remembers from step to step."""
    if not size:
        return {
            "STATE": "",
            "RESET": "",
            "MEMORY_TEXT": "this policy remembers nothing, so this does nothing.",
        }
    loop = f"    int i;\n    for (i = 0; i < {size}; ++i) state[i] = 0;"
    text = "the policy forgets the steps of the last one. The first episode needs no reset."
    return {"STATE": f"static policy_number state[{size}];\n", "RESET": loop, "MEMORY_TEXT": text}


def _describe(inputs: Mapping[str, tuple[int, ...]]) -> str:
    """Shapes, in the order in which the numbers lie."""
    return ", then ".join(f"{key} {list(shape)}".strip() for key, shape in inputs.items()) + ", float"


def _describe_action(head: ProgramHead) -> str:
    if head.kind == "argmax":
        return f"one of {head.outputs} choices"
    if head.kind == "multi_argmax":
        return f"one of {list(head.branches)} choices each"
    return f"{list(head.shape)}, {'0 or 1' if head.kind == 'threshold' else 'float'}"


def _filled(text: str, fields: Mapping[str, str]) -> str:
    for name, value in fields.items():
        text = text.replace(f"@{name}@", value)
    return text
