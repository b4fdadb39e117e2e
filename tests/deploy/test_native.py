"""The native runtime gives the reference's bits, on every kind of processor, and says what it cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from random_programs import memories, observations, programs
from shipped import compiled

from rlquant.control import collect, load, quantize_agent
from rlquant.control.compile import compile_agent
from rlquant.deploy import native, reference
from rlquant.deploy.c_build import NATIVE_FLAGS, shared_library
from rlquant.deploy.c_constants import interleave
from rlquant.deploy.floats import ACTIVATIONS
from rlquant.deploy.head import ProgramHead
from rlquant.deploy.native import NativeRuntime
from rlquant.deploy.program import Activate, Affine, Buffer, Program
from rlquant.errors import InputError

SHIPPED = ("dqn-cartpole", "ppo-lunarlander", "sac-pendulum", "sac-halfcheetah", "tqc-hopper", "cnn-catch")
# What other processors would compile: 512 bits without VNNI, 256 bits, 128 bits.
QUICK = tuple("-O1" if flag == "-O3" else flag for flag in NATIVE_FLAGS)
INSTRUCTION_SETS = {"avx512bw": ("-mavx512bw",), "avx2": ("-mavx2", "-mfma"), "baseline": ()}


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("libraries")


def instructions() -> set[str]:
    """What this processor can, as Linux names it; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def shown(x: dict[str, np.ndarray]) -> Any:
    """As the environment shows it."""
    return x[""] if set(x) == {""} else x


def assert_exact(program: Program, runtime: NativeRuntime, x: dict[str, np.ndarray]) -> None:
    states = memories(program, len(next(iter(x.values()))))
    before, after = states.copy(), states.copy()
    with np.errstate(all="ignore"):
        expected = reference.run(program, x, after)
    given = runtime.outputs(shown(x), states)
    assert given.dtype == np.float32
    np.testing.assert_array_equal(given.view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(states.view(np.int32), after.view(np.int32))
    actions, wanted = runtime.act_batch(shown(x), states=before), program.head(expected)
    assert actions.dtype == wanted.dtype
    np.testing.assert_array_equal(actions, wanted)
    runtime.reset()
    one = runtime.act({key: part[1] for key, part in x.items()} if set(x) != {""} else x[""][1])
    np.testing.assert_array_equal(one, wanted[1])


SOME = [
    ("ppo-lunarlander", "w8a8"),
    ("sac-pendulum", "w2a4"),
    ("cnn-catch", "w8a8"),
    ("sac-halfcheetah", "w4a8-g32"),
]
REST = [
    (name, scheme)
    for name in SHIPPED
    for scheme in ("w8a8", "w4a8-g32", "w2a4")
    if (name, scheme) not in SOME
]


@pytest.mark.parametrize(
    ("name", "scheme"), [*SOME, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)]
)
def test_shipped_agents_give_the_bits_of_the_reference(name: str, scheme: str, libraries: Path) -> None:
    program = compiled(name, scheme)
    assert program.is_integer
    assert_exact(
        program, NativeRuntime(program, cache=libraries), observations(program, 30 if "cnn" in name else 300)
    )


@given(program=programs())
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_program_gives_the_bits_of_the_reference(program: Program, libraries: Path) -> None:
    assert_exact(program, NativeRuntime(program, cache=libraries, flags=QUICK), observations(program, 64))


@pytest.mark.slow
@pytest.mark.parametrize("flags", INSTRUCTION_SETS.values(), ids=list(INSTRUCTION_SETS))
@pytest.mark.parametrize("scheme", ["w8a8", "w3a8-g16", "w5a16"])
@pytest.mark.parametrize("name", ["sac-pendulum", "cnn-catch"])
def test_other_processors_give_the_same_bits(
    name: str, scheme: str, flags: tuple[str, ...], libraries: Path
) -> None:
    lacking = {flag.removeprefix("-m") for flag in flags} - instructions()
    if lacking:
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    program = compiled(name, scheme)
    portable = tuple(flag for flag in NATIVE_FLAGS if flag != "-march=native")
    runtime = NativeRuntime(program, cache=libraries, flags=(*portable, *flags))
    assert_exact(program, runtime, observations(program, 50))


@pytest.mark.parametrize(
    ("name", "scheme"), [("sac-pendulum", "fp32"), ("sac-pendulum", "int4"), ("cnn-catch", "int3-g8")]
)
def test_float_programs_agree_up_to_rounding(name: str, scheme: str, libraries: Path) -> None:
    program = compiled(name, scheme)
    rng = np.random.default_rng(0)
    x = {key: rng.normal(size=(20, *shape)).astype(np.float32) for key, shape in program.inputs.items()}
    expected = reference.run(program, x)
    given = NativeRuntime(program, cache=libraries).outputs(shown(x))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_activations_on_floats_are_those_of_the_reference(libraries: Path) -> None:
    kinds, one = list(ACTIVATIONS), np.ones(1, np.float32)
    apart = tuple(Activate(0, i + 1, kind) for i, kind in enumerate(kinds))
    last = len(kinds) + 1
    joined = tuple(
        Affine(op.target, last, one, 0 * one, -one * np.inf, one * np.inf, start=9 * i)
        for i, op in enumerate(apart)
    )
    buffers = (*[Buffer(9)] * last, Buffer(9 * len(kinds)))
    program = Program(buffers, {"": (9,)}, apart + joined, ProgramHead("argmax", 9 * len(kinds)))
    x = np.array([[-30, -8, -1, -1e-3, 0, 1e-3, 1, 8, 30]], np.float32)
    given = NativeRuntime(program, cache=libraries).outputs(x).reshape(-1, 9)
    expected = reference.run(program, {"": x}).reshape(-1, 9)
    for kind, one_given, one_expected in zip(kinds, given, expected, strict=True):
        np.testing.assert_allclose(one_given, one_expected, rtol=1e-6, atol=1e-7, err_msg=kind)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_stay_packed(bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (70, 256), dtype=np.int32)
    for rows in (64, 70, 6):  # the last block has as many rows as are left
        assert interleave(values[:rows], bits, 256).nbytes == rows * 256 * bits // 8


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.uint8, np.int64, np.float16, bool])
def test_numbers_of_any_kind_are_observations(dtype: type, libraries: Path) -> None:
    program = compiled("sac-pendulum", "w8a8")
    runtime = NativeRuntime(program, cache=libraries)
    x = np.array([1, 0, 1]).astype(dtype)
    expected = runtime.act(x.astype(np.float32))
    np.testing.assert_array_equal(runtime.act(x), expected)
    np.testing.assert_array_equal(runtime.act(np.repeat(x, 2)[::2]), expected)
    np.testing.assert_array_equal(runtime.act(x.tolist()), expected)


def test_an_action_is_not_written_over_by_the_next(libraries: Path) -> None:
    runtime = NativeRuntime(compiled("sac-halfcheetah", "w8a8"), cache=libraries)
    first = runtime.act(np.full(17, 1, np.float32))
    kept = first.copy()
    assert not np.array_equal(runtime.act(np.full(17, -1, np.float32)), kept)
    np.testing.assert_array_equal(first, kept)


def test_programs_of_one_shape_share_a_library_but_no_numbers(libraries: Path) -> None:
    programs_ = [compiled("ppo-cartpole", "w8a8"), compile_of_other_calibration()]
    sources = {native.native_source(program)[0] for program in programs_}
    assert len(sources) == 1
    runtimes = [NativeRuntime(program, cache=libraries) for program in programs_]
    for program, runtime in zip(programs_, runtimes, strict=True):
        assert_exact(program, runtime, observations(program, 50))


def compile_of_other_calibration() -> Program:
    agent = load("ppo-cartpole")
    return compile_agent(quantize_agent(agent, "w8a8", inputs=collect(agent, 1, seed=9, limit=50)))


def test_masked_choices_are_never_taken(libraries: Path) -> None:
    program = compiled("ppo-lunarlander", "w8a8")
    runtime = NativeRuntime(program, cache=libraries)
    x = observations(program, 60)[""]
    masks = np.random.default_rng(0).random((60, 4)) < 0.5
    masks[:, 3] |= ~masks.any(axis=1)
    wanted = program.head(reference.run(program, {"": x}), masks)
    np.testing.assert_array_equal(runtime.act_batch(x, masks), wanted)
    assert runtime.act(x[5], masks[5]) == wanted[5]
    assert runtime.act(x[5], masks=masks[5]) == wanted[5]
    with pytest.raises(InputError, match="masks of 4 choices"):
        runtime.act(x[0], masks[0, :2])


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.array([0, np.nan, 0], np.float32), "NaN"),
        (np.array([0, np.nan, 0], np.float64), "NaN"),
        (np.zeros(4, np.float32), r"shape \[4\].*takes \[3\]"),
        (np.zeros((1, 3), np.float32), r"shape \[1, 3\].*takes \[3\]"),
        (np.array(["a", "b", "c"]), "dtype"),
        (np.zeros(3, complex), "dtype"),
        ({"camera": np.zeros(3)}, "camera"),
    ],
)
def test_what_is_no_observation_is_refused(observation: Any, message: str, libraries: Path) -> None:
    runtime = NativeRuntime(compiled("sac-pendulum", "w8a8"), cache=libraries)
    with pytest.raises(InputError, match=message):
        runtime.act(observation)


def test_large_finite_doubles_saturate_like_infinity(libraries: Path) -> None:
    runtime = NativeRuntime(compiled("sac-pendulum", "w8a8"), cache=libraries)
    np.testing.assert_array_equal(runtime.act(np.full(3, 1e300)), runtime.act(np.full(3, np.inf)))


def test_without_python_headers_it_says_so_and_acts_the_same(
    libraries: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = compiled("sac-pendulum", "w8a8")
    fast = NativeRuntime(program, cache=libraries)
    native.caller_module.cache_clear()
    monkeypatch.setattr(native.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.warns(UserWarning, match="Python's headers"):
        slow = NativeRuntime(program, cache=libraries)
    native.caller_module.cache_clear()
    x = np.ones(3, np.float32)
    np.testing.assert_array_equal(slow.act(x), fast.act(x))
    with pytest.raises(InputError, match="NaN"):
        slow.act(x * np.float32(np.nan))
    with pytest.raises(InputError, match="shape"):
        slow.act(x[:2])
    for dtype in (np.float64, np.int8, bool):
        np.testing.assert_array_equal(slow.act(x.astype(dtype)), fast.act(x))
    kept = slow.act(x)
    assert not np.array_equal(slow.act(-x), kept)
    np.testing.assert_array_equal(kept, fast.act(x))


@pytest.mark.parametrize(("cc", "looked_for"), [(None, "cc, gcc, clang"), ("tcc-of-yore", "tcc-of-yore")])
def test_no_compiler_is_an_error_that_tells_the_way_out(
    cc: str | None, looked_for: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if cc:
        monkeypatch.setenv("CC", cc)
    with pytest.raises(InputError, match=f"{looked_for}.*onnx or torch"):
        NativeRuntime(compiled("sac-pendulum", "w8a8"), cache=tmp_path / "libraries")
    assert not (tmp_path / "libraries").exists()


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no_such_type"):
        shared_library("no_such_type x;", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="XDG_CACHE_HOME"):
        NativeRuntime(compiled("sac-pendulum", "w8a8"), cache=tmp_path / "file" / "folder")


def test_processes_may_build_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from rlquant.deploy.c_build import shared_library\n"
        "print(shared_library('int x;', pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {builder.communicate()[0].strip() for builder in builders}
    assert paths == {str(path) for path in tmp_path.iterdir()}
    assert len(paths) == 1


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    script = (
        "import numpy as np\n"
        "from rlquant.deploy.head import ProgramHead\n"
        "from rlquant.deploy.native import NativeRuntime\n"
        "from rlquant.deploy.program import Activate, Affine, Buffer, Program\n"
        "p = Program((Buffer(3), Buffer(3)), {'': (3,)}, (Activate(0, 1, 'ReLU'),), ProgramHead('argmax', 3))\n"
        "print(NativeRuntime(p).act(np.array([0, 2, 1], np.float32)))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    first = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert first.stdout == "1\n", first.stderr
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "rlquant").iterdir()}
    compiler = tmp_path / "cc"
    real = subprocess.run(["sh", "-c", "command -v cc"], capture_output=True, text=True).stdout.strip()
    compiler.symlink_to(real)  # the same compiler by another path is the same compiler
    environment["CC"] = str(compiler)
    second = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert second.stdout == "1\n", second.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rlquant").iterdir()} == built
