"""A saved program acts without what made it: neither torch nor SciPy is imported, nothing is compiled twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from shipped import compiled

from rlquant.deploy.files import save_program
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
