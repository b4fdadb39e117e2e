"""Programs as files: what is saved is what is loaded, and nothing else is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_programs import memories, observations, programs

from rlquant.control import load
from rlquant.control.compile import compile_agent
from rlquant.deploy import reference
from rlquant.deploy.files import load_program, program_files, program_from_files, program_hash, save_program
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.program import Affine, Buffer, Conv2d, Linear, Program, Table, Weight
from rlquant.errors import InputError

JSON, TENSORS = "program.json", "program.safetensors"


def example() -> Program:
    """8 numbers to 4 bits; a convolution of 2x2 on 2x4; a table; a product of 6 inputs in groups of 4."""
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    rng = np.random.default_rng(0)
    conv = Conv2d(
        1,
        2,
        Weight(2, 4, 3, rng.integers(0, 256, 3, np.uint8)),
        np.zeros(2, np.float32),
        np.ones((2, 1), np.float32),
        4,
        source_zero=3,
        zero=8,
        high=1023,
        image=(1, 2, 4),
        kernel=(2, 2),
    )
    last = Linear(
        3,
        4,
        Weight(3, 6, 8, rng.integers(0, 256, 18, np.uint8)),
        np.zeros(3, np.float32),
        np.ones((3, 2), np.float32),
        4,
    )
    ops = (
        Affine(0, 1, one, zero + 7, zero, zero + 15),
        conv,
        Table(2, 3, np.arange(1024, dtype=np.uint16) // 4),
        last,
    )
    sizes = ((8, 32), (8, 4), (6, 10), (6, 8), (3, 32))
    head = ProgramHead("clip", 3, low=np.zeros(3, np.float32) - 1, high=np.ones(3, np.float32), shape=(3,))
    return Program(tuple(Buffer(*size) for size in sizes), {"": (8,)}, ops, head, "w8a8 rtn")


def rehashed(change: Callable[[dict[str, Any]], None]) -> dict[str, bytes]:
    """The example's files after a change to the JSON, with the hash that belongs to them."""
    import safetensors.numpy

    from rlquant.deploy import files as module

    files = program_files(example())
    document = json.loads(files[JSON])
    del document["sha256"]
    change(document)
    document["sha256"] = module._hash(document, safetensors.numpy.load(files[TENSORS]))
    return files | {JSON: json.dumps(document).encode()}


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(programs())
def test_what_is_loaded_computes_what_was_saved(program: Program) -> None:
    loaded = program_from_files(program_files(program), "memory")
    x, (states, others) = observations(program, 50), (memories(program, 50), memories(program, 50))
    np.testing.assert_array_equal(reference.run(loaded, x, states), reference.run(program, x, others))
    np.testing.assert_array_equal(states, others)
    expected = program.head(reference.run(program, x))
    np.testing.assert_array_equal(loaded.head(reference.run(loaded, x)), expected)
    assert list(loaded.inputs.items()) == list(program.inputs.items())
    assert loaded.nbytes == program.nbytes
    assert program_hash(loaded) == program_hash(program)
    assert program_files(loaded) == program_files(program)


@pytest.mark.parametrize("name", ["ppo-cartpole", "sac-pendulum", "cnn-catch"])
def test_float_programs_too(name: str, tmp_path: Path) -> None:
    program = compile_agent(load(name))
    size = save_program(program, tmp_path / "new" / "folder")
    loaded = load_program(tmp_path / "new" / "folder")
    assert size == sum(file.stat().st_size for file in (tmp_path / "new" / "folder").iterdir())
    assert size < program.nbytes + 8_000
    assert program_hash(loaded) == program_hash(program)
    assert loaded.name == program.name


def test_loading_needs_neither_torch_nor_scipy(tmp_path: Path) -> None:
    save_program(example(), tmp_path)
    code = (
        "import sys\nfrom rlquant.deploy.files import load_program\n"
        f"program = load_program({str(tmp_path)!r})\n"
        "print(len(program.ops), [m for m in ('torch', 'scipy', 'onnx', 'gymnasium') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["4", "[]\n"]


def test_hash_tells_any_two_programs_apart() -> None:
    one = example()
    bias = one.ops[3].bias.copy()  # type: ignore[union-attr]
    bias[2] = np.nextafter(bias[2], np.float32(1))
    last = Linear(**{**vars(one.ops[3]), "bias": bias})
    other = Program(one.buffers, one.inputs, (*one.ops[:3], last), one.head, one.name)
    renamed = Program(one.buffers, one.inputs, one.ops, one.head, "other")
    assert len({program_hash(program) for program in (one, other, renamed, example())}) == 3


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_file_cut_anywhere_is_refused(name: str) -> None:
    files = program_files(example())
    for end in range(0, len(files[name]), 7):
        with pytest.raises(InputError, match=r"damaged|hash|describe|schema|no valid program"):
            program_from_files(files | {name: files[name][:end]}, "policy")


@pytest.mark.parametrize("name", [JSON, TENSORS])
def test_a_flipped_bit_is_noticed_or_harmless(name: str) -> None:
    files = program_files(example())
    rng = np.random.default_rng(0)
    noticed = 0
    for position in rng.integers(0, len(files[name]), 400):
        content = bytearray(files[name])
        content[position] ^= 1 << rng.integers(8)
        try:
            loaded = program_from_files(files | {name: bytes(content)}, "policy")
        except InputError:
            noticed += 1
        else:  # white space of the JSON
            assert program_hash(loaded) == program_hash(example())
    assert noticed > 200


def test_swapped_tensors_are_noticed() -> None:
    files, others = program_files(example()), program_files(compile_agent(load("ppo-cartpole")))
    with pytest.raises(InputError, match="does not match its hash"):
        program_from_files(files | {TENSORS: others[TENSORS]}, "policy")


@pytest.mark.parametrize("schema", ["rlquant.program/2", "rlquant.policy/1", None, 1, ["rlquant.program/1"]])
def test_other_schemas_are_named(schema: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        document["schema"] = schema

    with pytest.raises(InputError, match=r"has the schema .*this rlquant reads 'rlquant\.program/1'"):
        program_from_files(rehashed(change), "policy")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"schema": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe\x00",
        b"cos\nsystem\n",
    ],
)
def test_what_is_no_program_is_refused(content: bytes) -> None:
    files = program_files(example())
    with pytest.raises(InputError, match=r"damaged|schema"):
        program_from_files(files | {JSON: content}, "policy")


HUGE = 10**12
CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("a huge buffer", lambda d: d["buffers"][1].update(size=HUGE), "size of a buffer"),
    ("huge bits", lambda d: d["buffers"][1].update(bits=HUGE), "bits of a buffer"),
    ("huge bits of a weight", lambda d: d["ops"][3]["weight"].update(bits=HUGE), "bits of the weight"),
    ("a huge weight", lambda d: d["ops"][3]["weight"].update(rows=HUGE), "rows of the weight"),
    ("more rows than codes", lambda d: d["ops"][3]["weight"].update(rows=4), "the weight is"),
    ("many buffers", lambda d: d.update(buffers=d["buffers"] * 2000), "buffers"),
    ("many operations", lambda d: d.update(ops=d["ops"] * 2000), "nothing|operations|missing"),
    ("a huge image", lambda d: d["ops"][1].update(image=[HUGE, HUGE, HUGE]), "image"),
    ("huge padding", lambda d: d["ops"][1].update(padding=[10**6, 10**6]), "padding"),
    ("no stride", lambda d: d["ops"][1].update(stride=[0, 0]), "stride"),
    ("a kernel of text", lambda d: d["ops"][1].update(kernel="22"), "kernel"),
    ("kernel beyond the image", lambda d: d["ops"][1].update(dilation=[5, 5]), "exceeds the image"),
    ("a source that is none", lambda d: d["ops"][3].update(source=99), "source"),
    ("a negative source", lambda d: d["ops"][3].update(source=-1), "source"),
    ("a source of the future", lambda d: d["ops"][0].update(source=3), "before it is written"),
    ("an input overwritten", lambda d: d["ops"][0].update(target=0), "is an input"),
    ("a start beyond the end", lambda d: d["ops"][0].update(start=4), "start"),
    ("a group of none", lambda d: d["ops"][3].update(group=0), "group"),
    ("a zero point beyond the grid", lambda d: d["ops"][1].update(source_zero=16), "zero point"),
    ("a code beyond the grid", lambda d: d["ops"][1].update(high=1024), "highest code"),
    ("a float index", lambda d: d["ops"][3].update(source=3.0), "source"),
    ("true as a number", lambda d: d["ops"][3].update(group=True), "group"),
    ("a number as a list", lambda d: d["ops"][3].update(group=[4]), "group"),
    ("no target", lambda d: d["ops"][3].pop("target"), "target"),
    ("an unknown field", lambda d: d["ops"][3].update(evil=1), "'evil'"),
    ("an unknown operation", lambda d: d["ops"][3].update(op="__import__"), "__import__"),
    ("an unknown head", lambda d: d["head"].update(kind="eval"), "unknown head 'eval'"),
    ("a head of other size", lambda d: d["head"].update(outputs=4), "head's outputs"),
    ("no operations", lambda d: d.update(ops=[]), "nothing|operations"),
    ("a memory before the inputs", lambda d: d.update(states=[[0, 4]]), "memory 0 is not buffer 1"),
    ("a memory of integers", lambda d: d.update(states=[[1, 4]]), "memory 1 is not float32"),
    ("text for the memory", lambda d: d.update(states=["ab"]), "memory 'a'"),
    ("no inputs", lambda d: d.update(inputs=[]), "input"),
    ("an input of other size", lambda d: d["inputs"][0].update(shape=[9]), "input"),
    ("a number for the operations", lambda d: d.update(ops=5), "describe"),
    ("text for the buffers", lambda d: d.update(buffers="abc"), "describe"),
]


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES]
)
def test_hostile_numbers_are_refused_before_anything_is_made_of_them(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        program_from_files(rehashed(change), "policy")


def test_tensors_of_other_types_and_values_are_refused() -> None:
    def with_last(**changes: Any) -> Program:
        one = example()
        object.__setattr__(one, "ops", (*one.ops[:3], Linear(**{**vars(one.ops[3]), **changes})))
        return one

    gain = np.ones((3, 2), np.float32)
    for bad, message in (
        ({"gain": gain.astype(np.float64)}, "gain is float64"),
        ({"gain": gain[:, :1]}, "gain is float32"),
        ({"gain": gain * np.float32(np.inf)}, "gain is not finite"),
        ({"bias": np.full(3, np.nan, np.float32)}, "bias is not finite"),
    ):
        with pytest.raises(InputError, match=message):
            program_from_files(program_files(with_last(**bad)), "policy")
    flat = example()
    flat.ops[0].gain[:] = 0  # type: ignore[union-attr]
    with pytest.raises(InputError, match="a gain is not positive"):
        program_from_files(program_files(flat), "policy")


def test_unreadable_and_unwritable_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"program\.json cannot be read: No such file"):
        load_program(tmp_path / "nothing")
    (tmp_path / JSON).mkdir()
    with pytest.raises(InputError, match="is no file"):
        load_program(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be created"):
        save_program(example(), tmp_path / "file" / "below")
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / JSON).open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(InputError, match="more than"):
        load_program(tmp_path / "large")
