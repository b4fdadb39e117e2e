"""Shared libraries from C source, built once and kept in a cache.

A library lies under the hash of its source, its flags, the compiler and the processor. It is built under
another name and renamed, so that two processes may build at once and no half-written file is ever loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from functools import cache
from pathlib import Path

from rlquant.errors import InputError

__all__ = ["NATIVE_FLAGS", "cache_folder", "find_compiler", "kernel_text", "shared_library"]

# IEEE arithmetic as written; the last two only say that nobody looks at errno and floating-point flags.
NATIVE_FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w",
)  # fmt: skip
_NAMES = ("cc", "gcc", "clang")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/rlquant``, by default ``~/.cache/rlquant``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlquant"


def find_compiler() -> str:
    """The path of ``$CC``, else of cc, gcc or clang. Raises InputError where there is none."""
    names = (os.environ["CC"],) if os.environ.get("CC") else _NAMES
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise InputError(
        f"the runtime native needs a C compiler; looked for {', '.join(names)} on the PATH: install gcc or clang, "
        "name one in the environment variable CC, or take the runtime onnx or torch"
    )


def shared_library(source: str, folder: Path | None = None, flags: tuple[str, ...] = NATIVE_FLAGS) -> Path:
    """The library of a source, built where the cache does not hold it yet.

    Raises:
        InputError: no compiler, or it failed; or the cache cannot be written.
    """
    compiler = find_compiler()
    folder = folder or cache_folder()
    stat = os.stat(compiler)
    parts = (
        source,
        *flags,
        os.path.realpath(compiler),
        str(stat.st_size),
        str(stat.st_mtime_ns),
        _processor(),
    )
    path = folder / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}.so"
    if not path.exists():
        _build(compiler, source, flags, path)
    return path


def kernel_text(name: str) -> str:
    """A C file that comes with the library."""
    return (Path(__file__).parent / "kernels" / name).read_text(encoding="utf-8")


def _build(compiler: str, source: str, flags: tuple[str, ...], path: Path) -> None:
    import subprocess  # both take longer to import than a library in the cache to load
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
            text, built = Path(scratch) / "policy.c", Path(scratch) / "policy.so"
            text.write_text(source, encoding="utf-8")
            command = [compiler, *flags, "-shared", "-fPIC", "-o", str(built), str(text), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = done.stderr.strip()[-400:]
                raise InputError(f"{' '.join(command[:-4])} failed: {said}; take the runtime onnx or torch")
            os.replace(built, path)
    except OSError as error:
        raise InputError(
            f"the cache {path.parent} cannot be written ({error.strerror}): name another folder in XDG_CACHE_HOME"
        ) from error


@cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU part")
    facts = {line for line in lines if line.startswith(names)}
    return " ".join([platform.machine(), *sorted(facts)])
