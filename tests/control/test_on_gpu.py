"""The network on a CUDA device; everything else stays where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlquant.control import evaluate, load, rollout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ["ppo-cartpole", "recurrentppo-cartpole", "cnn-catch"])
def test_an_evaluation_on_cuda_scores_as_on_the_cpu(name: str) -> None:
    agent = load(name)
    on_cpu = rollout(agent, range(8), seed=0).returns
    rows = evaluate(agent, ["int8", "w8a8"], episodes=8, device="cuda")["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8", "w8a8"]
    np.testing.assert_allclose(np.mean(rows[0]["score"]["episodes"]), on_cpu.mean(), rtol=0.05)
    assert rows[0]["agreement"]["action"] == 1.0
    assert rows[2]["agreement"]["action"] > 0.9
    assert all(row["latency_us"]["p50"] > 0 for row in rows)
