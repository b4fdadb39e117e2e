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

_REACH = 64
"""Tokens by which what a step looks at grows."""
_READ = 8192
"""Tokens of prompts that are read together, which bounds the memory of their activations."""


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
    """Sequences in the slots of a cache, and what the next step needs of each, in tensors that stay where they are."""

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
        self.tokens, self.positions, self.seeds, self.places = (
            torch.zeros(cache.slots, dtype=torch.int64, device=self.device) for _ in range(4)
        )

    def run(self, waiting: deque[Completion]) -> Iterator[Completion]:
        """Fill the slots, write a token in each, hand out what is finished, and so on."""
        while waiting or self.active:
            free = [slot for slot in range(self.cache.slots) if slot not in self.active]
            entering = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            if entering:
                self.active |= entering
                drawn = self._enter(entering)
                yield from self._take({slot: row for row, slot in enumerate(entering)}, drawn)
            if self.active:
                slots, reach = self._extent()
                drawn = self._step(slots, reach)
                yield from self._take({slot: slot for slot in self.active}, drawn)

    def _enter(self, entering: dict[int, Completion]) -> Tensor:
        """The first tokens of sequences, after their prompts."""
        slots = torch.tensor(list(entering), device=self.device)
        lengths = [len(self.prompts[each.prompt]) for each in entering.values()]
        self.positions[slots] = torch.tensor(lengths, device=self.device) - 1
        self.seeds[slots] = torch.tensor(
            [self._stream(each) for each in entering.values()], device=self.device
        )
        self.places[slots] = 0
        return self._draw(self._read(entering), slots)

    def _read(self, entering: dict[int, Completion]) -> Tensor:
        """Logits after prompts, ``[entering, vocabulary]``; each is read in the first of its slots and copied on."""
        same: dict[tuple[int, ...], list[int]] = {}
        for slot, each in entering.items():
            same.setdefault(tuple(self.prompts[each.prompt]), []).append(slot)
        found: dict[int, Tensor] = {}
        for part in _parts(list(same)):
            logits = self._prefill(part, [same[text][0] for text in part])
            for text, row in zip(part, logits, strict=True):
                first, *others = same[text]
                if others:
                    self.cache.copy_(first, others, len(text))
                found |= dict.fromkeys(same[text], row)
        return torch.stack([found[slot] for slot in entering])

    def _prefill(self, texts: list[tuple[int, ...]], slots: list[int]) -> Tensor:
        longest = max(map(len, texts))
        ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in texts], device=self.device)
        positions = torch.arange(longest, device=self.device).expand_as(ids)
        rows = torch.tensor(slots, device=self.device)
        hidden = self.decoder.hidden(ids, positions, self.cache, rows, longest)
        ends = torch.tensor([len(each) - 1 for each in texts], device=self.device)
        return self.decoder.logits(hidden[torch.arange(len(texts), device=self.device), ends])

    def _extent(self) -> tuple[int, int]:
        """Slots and tokens that a step looks at: few different numbers, so that shapes come again."""
        used = max(self.active) + 1
        slots = min(1 << (used - 1).bit_length(), self.cache.slots)
        longest = max(len(self.prompts[each.prompt]) + len(each.ids) for each in self.active.values())
        return slots, min(-(-longest // _REACH) * _REACH, self.cache.length)

    def _step(self, slots: int, reach: int) -> Tensor:
        """The next token of the first slots, whether a sequence is in them or not."""
        ids, positions = self.tokens[:slots, None], self.positions[:slots, None]
        hidden = self.decoder.hidden(ids, positions, self.cache, None, reach)
        return self._draw(self.decoder.logits(hidden[:, 0]), slice(slots))

    def _draw(self, logits: Tensor, slots: Tensor | slice) -> Tensor:
        """Sample and prepare the next step: float32 ``[3, slots]``, tokens, log-probabilities, 1 for sound logits."""
        tokens, log_probs = choose(logits, self.sampling, self.seeds[slots], self.places[slots])
        self.tokens[slots] = tokens
        self.positions[slots] = (self.positions[slots] + 1).clamp(max=self.cache.length - 1)
        self.places[slots] += 1
        return torch.stack([tokens.float(), log_probs, logits.isfinite().all(dim=-1).float()])

    def _take(self, rows: dict[int, int], drawn: Tensor) -> list[Completion]:
        """Add what was drawn, by slot and row; the sequences that are finished, whose slots are free from now on."""
        tokens, log_probs, sound = drawn.tolist()
        finished = []
        for slot, row in rows.items():
            each = self.active[slot]
            if not sound[row]:
                raise _not_finite(each)
            each.ids.append(int(tokens[row]))
            each.log_probs.append(log_probs[row])
            each.ended = each.ids[-1] in self.stop
            if each.ended or len(each.ids) == self.max_new_tokens:
                finished.append(each)
                del self.active[slot]
        return finished

    def _stream(self, each: Completion) -> int:
        return zlib.crc32(f"{self.seed}/{each.prompt}/{each.number}".encode())


def _parts(texts: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Prompts that are read together, so that their tokens with padding stay below a bound."""
    part: list[tuple[int, ...]] = []
    for text in texts:
        if part and max(map(len, [*part, text])) * (len(part) + 1) > _READ:
            yield part
            part = []
        part.append(text)
    yield part


def _not_finite(each: Completion) -> InputError:
    return InputError(
        f"the logits of token {len(each.ids)} of completion {each.number} of prompt {each.prompt} are not finite, and "
        "nothing was sampled from them: the weights or the adapter are of no use"
    )
