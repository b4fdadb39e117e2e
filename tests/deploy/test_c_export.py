"""Exported policies compile without a warning for every chip at hand and give the reference's bits there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_programs import programs
from shipped import compiled

from rlquant.deploy.export_c import TESTS, export_c, test_observations
from rlquant.deploy.program import Program

WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror")
AGENTS = [
    ("ppo-lunarlander", "w8a8"),
    ("sac-halfcheetah", "w4a8-g32"),
    ("sac-pendulum", "w3a4"),
    ("recurrentppo-cartpole", "w8a8"),
]
BOARDS = {
    "cortex-m3": ("-mcpu=cortex-m3", "-mfloat-abi=soft"),
    "cortex-m4": ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"),
    "cortex-m7": ("-mcpu=cortex-m7", "-mfpu=fpv5-d16", "-mfloat-abi=hard"),
}
test_observations.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=AGENTS, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    export_c(compiled(*request.param), folder)
    return folder


def run(*command: object, folder: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(folder: Path, compiler: str, *flags: str) -> None:
    run(compiler, *WARNINGS, *flags, "policy.c", "main.c", "-lm", "-o", "check", folder=folder)
    assert run("./check", folder=folder) == f"ok: {TESTS} observations\n"


def needs(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")


@pytest.mark.parametrize("level", ["-O0", "-O3"])
@pytest.mark.parametrize("word", [(), ("-m32",)], ids=["64 bits", "32 bits"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_on_this_machine(compiler: str, level: str, word: tuple[str, ...], exported: Path) -> None:
    needs(compiler)
    probe = subprocess.run(
        [compiler, *word, "-x", "c", "-o", "probe", "-"],
        cwd=exported,
        input="#include <stdio.h>\nint main(void) { return 0; }",
        text=True,
        capture_output=True,
    )
    if probe.returncode != 0:
        pytest.skip(f"{compiler} {' '.join(word)} is not installed (gcc-multilib)")
    check(exported, compiler, level, *word)


@pytest.mark.parametrize("standard", ["gnu99", "gnu17"])
def test_other_dialects_may_not_fuse_multiply_and_add(standard: str, exported: Path) -> None:
    needs("gcc")
    check(exported, "gcc", "-O3", f"-std={standard}", "-march=native")


@pytest.mark.parametrize("board", BOARDS)
def test_on_a_cortex_m(board: str, exported: Path, record_property: Any) -> None:
    needs("arm-none-eabi-gcc")
    needs("qemu-arm")
    build_for_board(exported, *BOARDS[board])
    assert run("qemu-arm", "board", folder=exported) == f"ok: {TESTS} observations\n"
    if board == "cortex-m4":
        record_property("instructions per action", instructions(exported))


def build_for_board(folder: Path, *flags: str) -> None:
    flags = ("-O2", "-mthumb", *flags)
    run("arm-none-eabi-gcc", *WARNINGS, *flags, "-c", "policy.c", "main.c", folder=folder)
    start = Path(__file__).with_name("cortex_m.c").resolve()
    parts = ("--specs=nosys.specs", "-nostartfiles", "policy.o", "main.o", start, "-lm", "-o", "board")
    run("arm-none-eabi-gcc", *flags, *parts, folder=folder)


def instructions(folder: Path) -> int:
    """Per action: one more of them is that many more lines in a trace of single instructions."""
    counts = []
    for actions in (1, 2):
        run("qemu-arm", "-singlestep", "-d", "exec,nochain", "-D", "trace", "board", actions, folder=folder)
        with (folder / "trace").open("rb") as trace:
            counts.append(sum(1 for _ in trace))
    (folder / "trace").unlink()
    assert counts[1] > counts[0] > 1000
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *AGENTS[:-1],
        ("sac-pendulum", "w4a8-g32"),
        ("tqc-hopper", "w8a8"),
        ("dqn-cartpole", "w8a16"),
        ("cnn-catch", "w8a8"),
    ],
)
def test_without_floats(name: str, scheme: str, tmp_path: Path) -> None:
    needs("gcc")
    export_c(compiled(name, scheme), tmp_path)
    check(tmp_path, "gcc", "-O2", "-DPOLICY_INTEGER_ONLY")


def test_a_chip_without_an_fpu_emulates_none(exported: Path) -> None:
    needs("arm-none-eabi-gcc")
    needs("qemu-arm")
    if "this policy computes in floats" in (exported / "policy.h").read_text():
        pytest.skip("an LSTM computes in floats")
    build_for_board(exported, *BOARDS["cortex-m3"], "-DPOLICY_INTEGER_ONLY")
    called = run("arm-none-eabi-nm", "--undefined-only", "policy.o", folder=exported).split()
    assert not [name for name in called if re.match(r"__aeabi_(f|d|i2f|l2f|ul2f)", name)]
    assert run("qemu-arm", "board", folder=exported) == f"ok: {TESTS} observations\n"


def test_programs_of_floats_refuse_to_do_without(tmp_path: Path) -> None:
    needs("gcc")
    export_c(compiled("sac-pendulum", "int4"), tmp_path)
    command = ("gcc", "-DPOLICY_INTEGER_ONLY", "-c", "policy.c")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "this policy computes in floats" in done.stderr


def test_memory_in_the_header_is_what_the_linker_sees(exported: Path) -> None:
    needs("gcc")
    run("gcc", *WARNINGS, "-Os", "-c", "policy.c", folder=exported)
    _, numbers = run("size", "policy.o", folder=exported).strip().split("\n")
    text, data, bss = (int(number) for number in numbers.split()[:3])
    header = (exported / "policy.h").read_text()
    ram = int(re.search(r"RAM +(\d+) bytes", header)[1])  # type: ignore[index]
    flash = int(re.search(r"flash +(\d+) bytes", header)[1])  # type: ignore[index]
    assert data == 0
    assert ram <= bss <= ram + 32  # alignment
    assert flash < text < flash + 4096


def test_nothing_of_the_c_library_is_needed(exported: Path) -> None:
    needs("gcc")
    run("gcc", *WARNINGS, "-O0", "-c", "policy.c", folder=exported)
    assert run("nm", "--undefined-only", "policy.o", folder=exported).replace(
        "_GLOBAL_OFFSET_TABLE_", ""
    ).split() in (
        [],
        ["U"],
    )
    included = re.findall(r"#include (\S+)", (exported / "policy.c").read_text())
    assert included == ['"policy.h"', "<math.h>"]


def test_the_check_notices_one_wrong_weight(tmp_path: Path) -> None:
    needs("gcc")
    export_c(compiled("ppo-lunarlander", "w8a8"), tmp_path)
    text = (tmp_path / "policy.c").read_text()
    first = re.search(r"static const int8_t \w+\[\d+\] = {\n +(-?\d+),", text)
    assert first is not None
    other = (int(first[1]) + 60) % 100
    (tmp_path / "policy.c").write_text(text[: first.start(1)] + str(other) + text[first.end(1) :])
    run("gcc", *WARNINGS, "policy.c", "main.c", "-lm", "-o", "check", folder=tmp_path)
    done = subprocess.run("./check", cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "mismatches" in done.stdout


@given(program=programs(widest=20))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_program_passes_its_own_check(program: Program, tmp_path_factory: pytest.TempPathFactory) -> None:
    needs("gcc")
    folder = tmp_path_factory.mktemp("any")
    export_c(program, folder)
    check(folder, "gcc", "-O1")


@pytest.mark.parametrize(
    ("name", "scheme"), [("cnn-catch", "w8a8"), ("sac-pendulum", "fp32"), ("sac-pendulum", "int4")]
)
def test_convolutions_and_floats(name: str, scheme: str, tmp_path: Path) -> None:
    needs("gcc")
    export_c(compiled(name, scheme), tmp_path)
    check(tmp_path, "gcc", "-O2")


def test_the_vector_has_tame_and_wild_observations() -> None:
    _, observations = test_observations(compiled("ppo-lunarlander", "w8a8"))
    x = observations[""]
    assert np.isfinite(x[: TESTS // 2]).all()
    assert np.isposinf(x[TESTS // 2 :]).any()
    assert np.isneginf(x[TESTS // 2 :]).any()
    assert not np.isnan(x).any()
    assert len(np.unique(x, axis=0)) == TESTS
