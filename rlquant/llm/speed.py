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

from rlquant.llm.model import LanguageModel
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
    generate = _engine(lm, prompts, tokens) if cache is None and lm.device.type == "cuda" else None
    generate = generate or partial(_generate, lm, torch.tensor(prompts, device=lm.device), cache)
    generate(min(4, tokens))
    cuda = lm.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(lm.device)
    nanoseconds = generate(tokens)
    peak = torch.cuda.max_memory_allocated(lm.device) if cuda else None
    steps = nanoseconds[1:]
    rate = batch * len(steps) / (steps.sum() / 1e9)
    return Generation(batch, nanoseconds[0] / 1e6, float(rate), Latency.of(steps, simulated=simulated), peak)


def _engine(lm: LanguageModel, prompts: list[list[int]], tokens: int) -> Callable[[int], np.ndarray] | None:
    # Imported here: the engine knows adapters, and so brings PEFT, which a model without them does without.
    from rlquant.llm.engine_sampler import settled
    from rlquant.llm.sampling import Sampling
    from rlquant.llm.timed_engine import TimedEngine

    if settled("auto", lm.model) == "transformers":
        return None
    greedy, length = Sampling(temperature=0), len(prompts[0]) + tokens
    return partial(TimedEngine(lm.model, slots=len(prompts), length=length, sampling=greedy).timed, prompts)


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
