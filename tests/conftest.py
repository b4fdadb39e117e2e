"""What tests share: the agents of others (where they are), and the command line run in process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

from rlquant import cli

# One thread: the networks are small, and several test processes share the cores.
torch.set_num_threads(1)

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Before Triton is imported: where there is no GPU, its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Agents that the rl-baselines3-zoo authors trained, laid out as in their repository."""
    folder = os.environ.get("RLQUANT_TEST_ZOO")
    if not folder:
        pytest.skip("RLQUANT_TEST_ZOO does not name a folder of rl-zoo agents")
    return Path(folder)


@dataclass(frozen=True)
class Finished:
    """A finished command."""

    status: int
    out: str
    err: str


@pytest.fixture
def rlquant(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Run the command line as ``rlquant ARGS``, in this process."""

    def run(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["rlquant", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return run
