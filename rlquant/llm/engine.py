"""Rollouts in the process that trains, from the same weights: prompts are read once, finished sequences make room.

    for completion in rollout(model, prompts, n=8, max_new_tokens=128):
        ...

A prompt is read once for the completions that start together, which share its cache. A sequence that ends leaves its
slot to the next that waits (continuous batching, Yu et al. 2022, Orca). Every sequence has a random stream of its own,
so neither the number of slots nor what is beside it changes what is sampled, but for the last bits of its logits.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.decoding import Decoder, StaticCache
from rlquant.llm.sampling import Sampling, choose

__all__ = ["Completion", "rollout"]


@dataclass
class Completion:
    """What was written after a prompt.

    Attributes:
        prompt: its number among the prompts.
        number: among the completions of that prompt.
        ids: token ids; the last is a stop token where ``ended``.
        log_probs: of these tokens, see :func:`~rlquant.llm.sampling.choose`.
        ended: whether a stop token ended it, and not its length.
    """

    prompt: int
    number: int
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False


def rollout(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    n: int = 1,
    stop: Collection[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    slots: int = 64,
    length: int | None = None,
) -> Iterator[Completion]:
    """Complete prompts with a model as it acts now; completions come as they are finished.

    Args:
        model: see :class:`~rlquant.llm.decoding.Decoder`; in evaluation mode.
        prompts: token ids.
        max_new_tokens: of a completion.
        n: completions of each prompt.
        stop: token ids that end a completion.
        sampling: by default from the whole distribution at temperature 1.
        seed: the same seed gives the same completions.
        slots: sequences at a time.
        length: tokens of a sequence that the cache holds; by default what the longest prompt needs.

    Raises:
        InputError: a prompt is empty or longer than the cache, the architecture is not supported, or logits are not
            finite, before anything is sampled from them.
    """
    if n < 1 or slots < 1 or max_new_tokens < 1:
        raise InputError(f"n={n}, slots={slots} and max_new_tokens={max_new_tokens} must be at least 1")
    needed = max(map(len, prompts), default=0) + max_new_tokens
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {number} is empty: it needs a token at least")
        if length is not None and len(prompt) + max_new_tokens > length:
            raise InputError(
                f"prompt {number} has {len(prompt)} tokens, and with {max_new_tokens} new ones is longer than the "
                f"{length} that the cache holds"
            )
    waiting = deque(Completion(prompt, number) for prompt in range(len(prompts)) for number in range(n))
    if not waiting:
        return iter(())
    decoder = Decoder(model)
    cache = decoder.cache(min(slots, len(waiting)), length or needed)
    batch = _Batch(decoder, cache, prompts, sampling or Sampling(), frozenset(stop), max_new_tokens, seed)
    return batch.run(waiting)


class _Batch:
    """Sequences in the slots of a cache."""

    def __init__(
        self,
        decoder: Decoder,
        cache: StaticCache,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop: frozenset[int],
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.decoder, self.cache, self.prompts = decoder, cache, prompts
        self.sampling, self.stop, self.max_new_tokens, self.seed = sampling, stop, max_new_tokens, seed
        self.device = cache.keys.device
        self.active: dict[int, Completion] = {}

    def run(self, waiting: deque[Completion]) -> Iterator[Completion]:
        """Fill the slots, write a token in each, hand out what is finished, and so on."""
        while waiting or self.active:
            free = [slot for slot in range(self.cache.slots) if slot not in self.active]
            entering = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            logits = self._read(entering) if entering else self._write()
            self.active |= entering
            yield from self._sample(logits, entering or self.active)

    def _read(self, entering: dict[int, Completion]) -> Tensor:
        """Logits after the prompts of sequences that enter; each prompt is read in the first of its slots."""
        first: dict[tuple[int, ...], int] = {}
        texts = {slot: tuple(self.prompts[each.prompt]) for slot, each in entering.items()}
        for slot, text in texts.items():
            first.setdefault(text, slot)
        read = list(first)
        longest = max(map(len, read))
        ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in read], device=self.device)
        positions = torch.arange(longest, device=self.device).expand_as(ids)
        places = torch.tensor(list(first.values()), device=self.device)
        hidden = self.decoder.hidden(ids, positions, self.cache, places, longest)
        ends = torch.tensor([len(each) - 1 for each in read], device=self.device)
        last = hidden[torch.arange(len(read), device=self.device), ends]
        for text, slot in first.items():
            others = [other for other, same in texts.items() if same == text and other != slot]
            if others:
                self.cache.copy_(slot, others, len(text))
        row = {text: number for number, text in enumerate(first)}
        rows = torch.tensor([row[text] for text in texts.values()], device=self.device)
        return self.decoder.logits(last)[rows]

    def _write(self) -> Tensor:
        """Logits after the last tokens of all sequences."""
        ids = torch.tensor([[each.ids[-1]] for each in self.active.values()], device=self.device)
        lengths = [len(self.prompts[each.prompt]) + len(each.ids) for each in self.active.values()]
        positions = torch.tensor(lengths, device=self.device)[:, None] - 1
        slots = torch.tensor(list(self.active), device=self.device)
        hidden = self.decoder.hidden(ids, positions, self.cache, slots, max(lengths))
        return self.decoder.logits(hidden[:, 0])

    def _sample(self, logits: Tensor, sequences: dict[int, Completion]) -> list[Completion]:
        """A token for each sequence; those that are finished, whose slots are free from now on."""
        self._refuse_nan(logits, sequences)
        seeds = torch.tensor([self._stream(each) for each in sequences.values()], device=self.device)
        places = torch.tensor([len(each.ids) for each in sequences.values()], device=self.device)
        tokens, log_probs = choose(logits, self.sampling, seeds, places)
        finished = []
        drawn = zip(list(sequences.items()), tokens.tolist(), log_probs.tolist(), strict=True)
        for (slot, each), token, log_prob in drawn:
            each.ids.append(token)
            each.log_probs.append(log_prob)
            each.ended = token in self.stop
            if each.ended or len(each.ids) == self.max_new_tokens:
                finished.append(each)
                del self.active[slot]
        return finished

    def _stream(self, each: Completion) -> int:
        return zlib.crc32(f"{self.seed}/{each.prompt}/{each.number}".encode())

    def _refuse_nan(self, logits: Tensor, sequences: dict[int, Completion]) -> None:
        good = logits.isfinite().all(dim=-1).tolist()
        for sound, each in zip(good, sequences.values(), strict=True):
            if not sound:
                raise InputError(
                    f"the logits of token {len(each.ids)} of completion {each.number} of prompt {each.prompt} are not "
                    "finite, and nothing was sampled from them: the weights or the adapter are of no use"
                )
