"""What takes a batch from token to token: the model's own layers, or fused kernels, held in a CUDA graph on a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from rlquant.devices import has_triton
from rlquant.errors import InputError
from rlquant.llm.decode.cache import StaticCache
from rlquant.llm.decode.graphs import Graph
from rlquant.llm.decoding import Decoder, State
from rlquant.llm.sampling import Sampling, choose

__all__ = ["Steps", "draw"]

_TOGETHER = 8
"""Steps of a graph, after which what they drew is read: a sequence that ends among them is let run until then."""


class Steps:
    """Steps of the first slots of a cache.

    Attributes:
        together: how many one call takes.
        captured: whether they are in graphs.
        pool: of these graphs' memory.
    """

    def __init__(self, decoder: Decoder, cache: StaticCache, state: State, sampling: Sampling) -> None:
        self.decoder, self.cache, self.state, self.sampling = decoder, cache, state, sampling
        self.fused: Any = None
        self.graphs: dict[tuple[int, int], Graph] = {}
        device = cache.keys.device
        self.captured = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captured else None
        if self.captured and has_triton():
            from rlquant.llm.decode.step import FusedStep

            try:
                self.fused = FusedStep(decoder, cache, state, sampling)
            except InputError as error:
                self._unfuse(error)
        self.together = _TOGETHER if self.captured else 1

    def _unfuse(self, error: InputError) -> None:
        self.fused = None
        self.graphs.clear()
        warnings.warn(f"rollouts take the model's own layers: {error}", stacklevel=4)

    @torch.no_grad()
    def __call__(self, slots: int, reach: int) -> Tensor:
        """Take steps, which look at no position from ``reach`` on.

        Returns:
            float32 ``[together, 3, cache.slots]``, see :func:`draw`; its memory is written to by the next call.
        """
        if not self.captured:
            return self._drawn(slots, reach)
        with torch.cuda.device(self.cache.keys.device):
            return self._replayed(slots, reach)

    def _replayed(self, slots: int, reach: int) -> Tensor:
        key = (slots, 0 if self.fused else reach)
        if key not in self.graphs:
            try:
                written = (self.state.tokens, self.state.positions, self.state.places)
                self.graphs[key] = Graph(lambda: self._drawn(slots, reach), kept=written, pool=self.pool)
            except InputError as error:
                self._unfuse(error)
                return self._replayed(slots, reach)
            except RuntimeError as error:  # a layer that waits for the GPU, or a device that has no graphs
                reason = str(error).partition("\n")[0]
                warnings.warn(f"rollouts go without CUDA graphs: {reason}", stacklevel=4)
                self.captured = False
                return self._drawn(slots, reach)
        return self.graphs[key]()

    def refresh(self) -> None:
        """Take the adapters as they are now."""
        if self.fused is not None:
            self.fused.refresh()

    def _drawn(self, slots: int, reach: int) -> Tensor:
        drawn = torch.zeros(self.together, 3, self.cache.slots, device=self.cache.keys.device)
        for each in drawn:
            if self.fused is not None:
                self.fused(slots, each)
            else:
                self._by_layers(slots, reach, each)
        return drawn

    def _by_layers(self, slots: int, reach: int, drawn: Tensor) -> None:
        state = self.state
        ids, positions = state.tokens[:slots, None], state.positions[:slots, None]
        hidden = self.decoder.hidden(ids, positions, self.cache, None, reach)
        drawn[:, :slots] = draw(
            self.decoder.logits(hidden[:, 0]), self.sampling, state, slice(slots), self.cache.length
        )


def draw(logits: Tensor, sampling: Sampling, state: State, slots: Tensor | slice, length: int) -> Tensor:
    """Sample and prepare the next step.

    Args:
        logits: float32 ``[batch, vocabulary]``.
        sampling: how.
        state: of all slots, written to.
        slots: those of the logits.
        length: of the cache, which positions stay below.

    Returns:
        float32 ``[3, batch]``: tokens, log-probabilities, 1 where all logits are finite.
    """
    tokens, log_probs = choose(logits, sampling, state.seeds[slots], state.places[slots])
    state.tokens[slots] = tokens
    state.positions[slots] = (state.positions[slots] + 1).clamp(max=length - 1)
    state.places[slots] += 1
    return torch.stack([tokens.float(), log_probs, logits.isfinite().all(dim=-1).float()])
