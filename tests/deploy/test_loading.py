"""A saved program acts without what made it: neither torch nor SciPy is imported, nothing is compiled twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shipped import compiled

from rlquant.deploy.files import save_program
from rlquant.deploy.native import NativeRuntime
from rlquant.deploy.runtime import make_runtime

_FIRST_ACTION = """
import json, sys
import numpy as np
from rlquant.deploy.files import load_program
from rlquant.deploy.runtime import make_runtime
program = load_program(sys.argv[1])
action = make_runtime("native", program).act(np.zeros(program.inputs[""], np.float32))
print(json.dumps([np.asarray(action).tolist(), sorted(name for name in sys.modules if "." not in name)]))
"""


def test_the_first_action_needs_no_torch_no_scipy_and_no_compiler(tmp_path: Path) -> None:
    program = compiled("ppo-lunarlander", "w8a8")
    save_program(program, tmp_path)
    observation = np.zeros(program.inputs[""], np.float32)
    expected = make_runtime("native", program).act(observation)  # the library is in the cache from here on
    command = [sys.executable, "-c", _FIRST_ACTION, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    action, modules = json.loads(done.stdout)
    assert action == expected.tolist()
    assert not {"torch", "scipy", "onnx", "subprocess"} & set(modules)


_HELD = """
import gc, json, sys, tracemalloc
import numpy as np
import rlquant.deploy.native
from rlquant.deploy.files import load_program
from rlquant.deploy.runtime import make_runtime
tracemalloc.start()
program = load_program(sys.argv[1])
shape = program.inputs[""]
runtime = make_runtime("native", program)
runtime.act(np.zeros(shape, np.float32))
del program
gc.collect()
arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
held = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)
print(json.dumps([held, runtime.nbytes]))
"""


@pytest.mark.parametrize(("scheme", "share"), [("w8a8", 0.27), ("w4a8", 0.15)])
def test_no_weight_is_held_twice_or_unpacked(scheme: str, share: float, tmp_path: Path) -> None:
    program = compiled("sac-halfcheetah", scheme)  # 17-256-256-6
    save_program(program, tmp_path)
    fp32 = 4 * (17 * 256 + 256 + 256 * 256 + 256 + 256 * 6 + 6)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= share * fp32
    runtime = NativeRuntime(program)
    assert runtime.constants.nbytes <= share * fp32
    command = [sys.executable, "-c", _HELD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, nbytes = json.loads(done.stdout)
    assert nbytes == runtime.nbytes
    assert nbytes <= held <= nbytes + 1024  # the observation, the action and the head's bounds
