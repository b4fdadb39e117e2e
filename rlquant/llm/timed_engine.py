"""The rollout engine with a clock, for the time of generation."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rlquant.llm.engine import Engine

__all__ = ["TimedEngine"]


class TimedEngine(Engine):
    """Keeps the time of its steps; those of one graph count alike."""

    def timed(self, prompts: Sequence[Sequence[int]], tokens: int) -> np.ndarray:
        """Nanoseconds of each step, int64 ``[tokens]``; the first reads the prompts."""
        self._marks = [time.perf_counter_ns()]
        for _ in self.complete(prompts, max_new_tokens=tokens):
            pass
        first, *steps = np.diff(self._marks)
        return np.array(
            [first, *np.repeat(steps, self.steps.together) // self.steps.together][:tokens], np.int64
        )

    def step(self, slots: int, reach: int) -> Tensor:
        """See :class:`~rlquant.llm.engine.Engine`; waits for the GPU, as the reading of tokens would."""
        self._wait()
        if len(self._marks) == 1:
            self._marks.append(time.perf_counter_ns())
        drawn = super().step(slots, reach)
        self._wait()
        self._marks.append(time.perf_counter_ns())
        return drawn

    def _wait(self) -> None:
        if self.cache.keys.is_cuda:
            torch.cuda.synchronize(self.cache.keys.device)
