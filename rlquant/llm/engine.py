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

from rlquant.devices import free_bytes
from rlquant.errors import InputError
from rlquant.llm.decode.prefill import Prefill
from rlquant.llm.decode.steps import Steps, draw
from rlquant.llm.decoding import Decoder, State
from rlquant.llm.sampling import Sampling
from rlquant.quant import device_of

__all__ = ["MOST_SLOTS", "Completion", "Engine", "rollout"]

_REACH = 64
"""Tokens by which what a step looks at grows."""
MOST_SLOTS = 128
"""Sequences at a time: more of them share what reading the weights costs, but that is little by then."""
_SHARE = 0.7
"""Of free memory, that a cache may take."""
_DRAWN = 16
"""Sequences whose first tokens are drawn together, which bounds the memory of their logits."""


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
    slots: int | None = None,
    length: int | None = None,
    cache: str | None = None,
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
        slots: sequences at a time; by default as many as there are, up to 128 and to what fits into free memory.
        length: tokens of a sequence that the cache holds; by default what the longest prompt needs.
        cache: scheme of a quantized KV cache, see :data:`~rlquant.llm.decode.cache.CACHES`.

    Raises:
        InputError: a prompt is empty or longer than the cache, the architecture is not supported, or logits are not
            finite, before anything is sampled from them.
    """
    if slots is not None and slots < 1:
        raise InputError(f"slots={slots} must be at least 1")
    needed = max(map(len, prompts), default=0) + max_new_tokens
    engine = Engine(
        model,
        slots=min(slots or MOST_SLOTS, max(1, n * len(prompts))),
        length=length or max(needed, 1),
        sampling=sampling,
        cache=cache,
    )
    return engine.complete(prompts, max_new_tokens=max_new_tokens, n=n, stop=stop, seed=seed)


class Engine:
    """What rollouts of one model share: a cache, and steps that are captured once.

    Args:
        model, sampling, cache: see :func:`rollout`. Which adapter acts is settled here; its weights may change.
        slots: sequences at a time; fewer where free memory does not hold their cache.
        length: tokens of a sequence that the cache holds.

    Raises:
        InputError: the architecture is not supported, or not one sequence of the length fits.
    """

    def __init__(
        self,
        model: Any,
        *,
        slots: int,
        length: int,
        sampling: Sampling | None = None,
        cache: str | None = None,
    ) -> None:
        self.sampling, self.slots, self.length = sampling or Sampling(), slots, length
        self.decoder = Decoder(model)
        self.cache = self.decoder.cache(self._fitting(slots, length, cache), length, cache)
        self.state = State.of(slots, self.cache.keys.device)
        self.steps = Steps(self.decoder, self.cache, self.state, self.sampling)
        self.prefill = Prefill(self.decoder, self.cache, captured=self.steps.captured, pool=self.steps.pool)

    def step(self, slots: int, reach: int) -> Tensor:
        """See :class:`~rlquant.llm.decode.steps.Steps`."""
        return self.steps(slots, reach)

    def serves(self, slots: int, length: int) -> bool:
        """Whether sequences of such a length fit, and as many at a time as would if it were made for them."""
        return slots <= self.slots and length <= self.length

    def _fitting(self, slots: int, length: int, cache: str | None) -> int:
        """Slots whose cache free memory holds, next to what a prompt's activations need."""
        device = device_of(self.decoder.model)
        each = self.decoder.cache_bytes(length, cache)
        free = free_bytes(device)
        if free is None or slots * each <= _SHARE * free:
            return slots
        found = int(_SHARE * free / each)
        if not found:
            raise InputError(
                f"a cache of {length:,} tokens takes {each / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free: "
                "shorten prompts or completions, or free memory"
            )
        return found

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        n: int = 1,
        stop: Collection[int] = (),
        seed: int = 0,
    ) -> Iterator[Completion]:
        """See :func:`rollout`."""
        if n < 1 or max_new_tokens < 1:
            raise InputError(f"n={n} and max_new_tokens={max_new_tokens} must be at least 1")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {number} is empty: it needs a token at least")
            if len(prompt) + max_new_tokens > self.cache.length:
                raise InputError(
                    f"prompt {number} has {len(prompt)} tokens, and with {max_new_tokens} new ones is longer than the "
                    f"{self.cache.length} that the cache holds"
                )
        self.steps.refresh()
        waiting = deque(Completion(prompt, number) for prompt in range(len(prompts)) for number in range(n))
        return _Batch(self, prompts, frozenset(stop), max_new_tokens, seed).run(waiting)


class _Batch:
    """Sequences in the slots of a cache."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        stop: frozenset[int],
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.engine, self.prompts = engine, prompts
        self.stop, self.max_new_tokens, self.seed = stop, max_new_tokens, seed
        self.decoder, self.cache, self.state = engine.decoder, engine.cache, engine.state
        self.device = self.cache.keys.device
        self.active: dict[int, Completion] = {}

    def run(self, waiting: deque[Completion]) -> Iterator[Completion]:
        """Fill the slots, write tokens in each, hand out what is finished, and so on."""
        while waiting or self.active:
            free = [slot for slot in range(self.cache.slots) if slot not in self.active]
            entering = {slot: waiting.popleft() for slot in free[: len(waiting)]}
            if entering:
                self.active |= entering
                drawn = self._enter(entering)
                yield from self._take({slot: row for row, slot in enumerate(entering)}, drawn.tolist())
            if self.active:
                for drawn in self.engine.step(*self._extent()).tolist():
                    yield from self._take({slot: slot for slot in self.active}, drawn)

    def _enter(self, entering: dict[int, Completion]) -> Tensor:
        """The first tokens of sequences, after their prompts."""
        slots = torch.tensor(list(entering), device=self.device)
        lengths = [len(self.prompts[each.prompt]) for each in entering.values()]
        state = self.state
        state.positions[slots] = torch.tensor(lengths, device=self.device) - 1
        state.seeds[slots] = torch.tensor(
            [self._stream(each) for each in entering.values()], device=self.device
        )
        state.places[slots] = 0
        return self._read(entering)

    def _read(self, entering: dict[int, Completion]) -> Tensor:
        """What is drawn after prompts; each is read in the first of its slots and copied on."""
        same: dict[tuple[int, ...], list[int]] = {}
        for slot, each in entering.items():
            same.setdefault(tuple(self.prompts[each.prompt]), []).append(slot)
        column = {slot: number for number, slot in enumerate(entering)}
        drawn = torch.empty(3, len(entering), device=self.device)
        prefill = self.engine.prefill
        for part in prefill.parts(list(same)):
            logits = prefill(part, [same[text][0] for text in part])
            for text in part:
                first, *others = same[text]
                if others:
                    self.cache.copy_(first, others, len(text))
            following = [(slot, row) for row, text in enumerate(part) for slot in same[text]]
            for start in range(0, len(following), _DRAWN):
                slots, rows = zip(*following[start : start + _DRAWN], strict=True)
                drawn[:, [column[slot] for slot in slots]] = draw(
                    logits[list(rows)],
                    self.engine.sampling,
                    self.state,
                    torch.tensor(slots, device=self.device),
                    self.cache.length,
                )
        return drawn

    def _extent(self) -> tuple[int, int]:
        """Slots and tokens that the next steps look at: few different numbers, so that shapes come again."""
        used = max(self.active) + 1
        slots = min(1 << (used - 1).bit_length(), self.cache.slots)
        longest = max(len(self.prompts[each.prompt]) + len(each.ids) for each in self.active.values())
        longest += self.engine.steps.together - 1
        return slots, min(-(-longest // _REACH) * _REACH, self.cache.length)

    def _take(self, rows: dict[int, int], drawn: list[list[float]]) -> list[Completion]:
        """Add what was drawn, by slot and row; the sequences that are finished, whose slots are free from now on."""
        tokens, log_probs, sound = drawn
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


def _not_finite(each: Completion) -> InputError:
    return InputError(
        f"the logits of token {len(each.ids)} of completion {each.number} of prompt {each.prompt} are not finite, and "
        "nothing was sampled from them: the weights or the adapter are of no use"
    )
