"""How fast a language model generates: time to the first token, time of each token after it, at several batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlquant.llm.engine import Engine
from rlquant.llm.engine_sampler import settled
from rlquant.llm.model import LanguageModel
from rlquant.llm.sampling import Sampling
from rlquant.measure import Latency

__all__ = ["Generation", "time_generation"]


@dataclass(frozen=True)
class Generation:
    """Greedy generation: by the rollout engine on a GPU, for the architectures that it knows, and elsewhere by the
    model's own forward pass.

    Attributes:
        batch: sequences at a time.
        first_token_ms: from the prompts to the first token.
        tokens_per_second: of all sequences together, after the first token.
        step: time of each step after the first, in microseconds.
        peak_bytes: the most CUDA memory in use; None on the CPU.
    """

    batch: int
    first_token_ms: float
    tokens_per_second: float
    step: Latency
    peak_bytes: int | None


def time_generation(
    lm: LanguageModel,
    prompt: Sequence[int],
    *,
    batch: int = 1,
    tokens: int = 32,
    simulated: bool,
    cache: Callable[[], Any] | None = None,
) -> Generation:
    """Generate ``tokens`` tokens after ``prompt`` twice, timing the second run.

    Args:
        lm: the model.
        prompt: token ids, the same for all sequences.
        batch: sequences at a time.
        tokens: at least 2.
        simulated: whether a faster form of the weights is only simulated; see :class:`rlquant.measure.Latency`.
        cache: makes a KV cache for the model's own forward pass; by default the engine's, or transformers' own.
    """
    prompts = [list(prompt)] * batch
    if cache is None and settled("auto", lm.model) == "rlquant":
        engine = _TimedEngine(
            lm.model, slots=batch, length=len(prompt) + tokens, sampling=Sampling(temperature=0)
        )
        generate = partial(engine.timed, prompts)
    else:
        ids = torch.tensor(prompts, device=lm.device)
        generate = partial(_generate, lm, ids, cache)
    generate(min(4, tokens))
    cuda = lm.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(lm.device)
    nanoseconds = generate(tokens)
    peak = torch.cuda.max_memory_allocated(lm.device) if cuda else None
    steps = nanoseconds[1:]
    rate = batch * len(steps) / (steps.sum() / 1e9)
    return Generation(batch, nanoseconds[0] / 1e6, float(rate), Latency.of(steps, simulated=simulated), peak)


class _TimedEngine(Engine):
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
        _finish(self.cache.keys.device)
        if len(self._marks) == 1:
            self._marks.append(time.perf_counter_ns())
        drawn = super().step(slots, reach)
        _finish(self.cache.keys.device)
        self._marks.append(time.perf_counter_ns())
        return drawn


def _generate(lm: LanguageModel, ids: Tensor, cache: Callable[[], Any] | None, tokens: int) -> np.ndarray:
    """Nanoseconds of each step, int64 ``[tokens]``; the first reads the prompts."""
    from transformers import DynamicCache

    device = lm.device
    past = DynamicCache(config=lm.model.config) if cache is None else cache()
    times = np.empty(tokens, np.int64)
    for step in range(tokens):
        _finish(device)
        start = time.perf_counter_ns()
        with torch.no_grad():
            logits = lm.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        _finish(device)
        times[step] = time.perf_counter_ns() - start
    return times


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
