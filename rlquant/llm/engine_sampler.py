"""The engine as training uses it: kept from step to step, made anew where a batch outgrows it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

from rlquant.devices import has_triton
from rlquant.errors import InputError
from rlquant.llm.decoding import Decoder
from rlquant.llm.dense_policy import Dense, DensePolicy
from rlquant.llm.engine import MOST_SLOTS, Completion, Engine
from rlquant.llm.sampling import Sampling
from rlquant.quant import device_of

__all__ = ["DENSE", "EngineSampler", "settled"]

DENSE: dict[str, Dense] = {"rlquant-dense": "float", "rlquant-int8": "int8"}
"""What settings call the dense policies."""

_LENGTHS = 64


class EngineSampler:
    """Completions by a model as it acts and is at every call.

    Args:
        model: in evaluation mode while it is called; the same adapter acts at all calls.
        max_new_tokens: of a completion.
        sampling: how.
        dense: see :class:`~rlquant.llm.dense_policy.DensePolicy`; None samples from base and adapter as they are.
        cache: scheme of the KV cache, see :data:`~rlquant.llm.decode.cache.CACHES`.

    Raises:
        InputError: as :class:`~rlquant.llm.decoding.Decoder`.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        dense: Dense | None = None,
        cache: str | None = None,
    ) -> None:
        Decoder(model)
        self.model, self.max_new_tokens, self.sampling, self.cache = model, max_new_tokens, sampling, cache
        self._dense = DensePolicy(model, dense) if dense else None
        self._engine: Engine | None = None

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, stop: Collection[int], seed: int
    ) -> list[Completion]:
        """A completion of each prompt, in their order."""
        with self._dense.acting() if self._dense else nullcontext():
            engine = self._engine_for(prompts)
            made = engine.complete(prompts, max_new_tokens=self.max_new_tokens, stop=stop, seed=seed)
            return sorted(made, key=lambda each: each.prompt)

    def _engine_for(self, prompts: Sequence[Sequence[int]]) -> Engine:
        longest = max(map(len, prompts), default=1) + self.max_new_tokens
        slots, length = min(MOST_SLOTS, max(1, len(prompts))), -(-longest // _LENGTHS) * _LENGTHS
        if self._engine is None or not self._engine.serves(slots, length):
            if self._engine is not None:
                slots, length = max(slots, self._engine.slots), max(length, self._engine.length)
                self._engine = None  # its memory first
            self._engine = Engine(
                self.model, slots=slots, length=length, sampling=self.sampling, cache=self.cache
            )
        return self._engine


def settled(rollouts: str, model: Any) -> str:
    """What samples where the settings say auto: the engine on a GPU, generate where it cannot, with a warning."""
    if rollouts != "auto":
        return rollouts
    if device_of(model).type != "cuda" or not has_triton():
        return "transformers"
    try:
        Decoder(model)
    except InputError as error:
        warnings.warn(f"transformers' generate samples: {error}", stacklevel=2)
        return "transformers"
    return "rlquant"
