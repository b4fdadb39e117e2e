"""A decoder run block by block: what flows between the blocks waits in memory, and one block at a time computes.

So that a model quantizes on a device that cannot hold it, weights stay where they are (on the CPU, or not even
loaded) until their block's turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.model import LanguageModel, decoder_of
from rlquant.quant import device_of

__all__ = ["BlockStream", "OneBlock", "blocks_in_turn"]


class OneBlock(nn.Module):
    """A transformer block as a module of one input and one output, hidden states ``[batch, tokens, hidden]``.

    What else a block needs (positions, mask) is the same for all windows of one length. Inputs are taken to the
    block's device.
    """

    def __init__(self, block: nn.Module, arguments: dict[int, dict[str, Any]]) -> None:
        super().__init__()
        self.block = block
        self._arguments = arguments  # by batch size

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output."""
        device = device_of(self.block)
        out = self.block(hidden.to(device, non_blocking=True), **_moved(self._arguments[len(hidden)], device))
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def blocks_in_turn(
    lm: LanguageModel, device: str | torch.device, arguments: dict[int, dict[str, Any]] | None = None
) -> Iterator[tuple[int, OneBlock]]:
    """Each block on a device, with its number.

    The block may be changed (quantized, in place of :attr:`OneBlock.block`) while it is at hand; it is put back into
    the model, on the device it came from. Where the model's weights are unread, it is read only then.
    """
    layers = decoder_of(lm.model).layers
    for index in range(len(layers)):
        lm.read_(layers[index], f"model.layers.{index}")
        home = device_of(layers[index])
        one = OneBlock(layers[index].to(device), arguments or {})
        yield index, one
        layers[index] = one.block.to(home)


class BlockStream:
    """Hidden states of calibration windows on their way through the blocks of a model.

    Args:
        lm: its model is laid out as :func:`~rlquant.llm.model.decoder_of` says.
        tokens: int64 ``[windows, length]``.
        device: where blocks compute, one after the other.
        batch: windows that go through a block together.

    Attributes:
        hidden: what enters the next block: a tensor ``[batch, length, hidden]`` for each batch, on the CPU.
    """

    def __init__(
        self, lm: LanguageModel, tokens: Tensor, *, device: str | torch.device = "cpu", batch: int = 4
    ) -> None:
        self.lm, self.device = lm, torch.device(device)
        kinds = set(getattr(lm.model.config, "layer_types", None) or ["full_attention"])
        if len(kinds) > 1:
            raise InputError(
                f"{type(lm.model).__name__} mixes blocks of {', '.join(sorted(kinds))}; one kind is supported"
            )
        self._arguments: dict[int, dict[str, Any]] = {}
        shares = torch.split(tokens, batch)
        self.hidden = [self._enter(share) for share in shares]

    def blocks(self) -> Iterator[tuple[int, OneBlock]]:
        """See :func:`blocks_in_turn`; afterwards the hidden states have passed the block."""
        for index, one in blocks_in_turn(self.lm, self.device, self._arguments):
            yield index, one
            self._pass(one)

    def onward(self, index: int) -> list[Tensor]:
        """What would leave the decoder, its last norm passed, if block ``index`` were as it is now.

        For use while that block is at hand; the hidden states of the stream stay where they are. One tensor
        ``[batch, length, hidden]`` for each batch, on the device of the norm.
        """
        decoder, left = decoder_of(self.lm.model), []
        with torch.no_grad():
            for hidden in self.hidden:
                for block in decoder.layers[index:]:
                    hidden = OneBlock(block, self._arguments)(hidden)
                left.append(decoder.norm(hidden.to(device_of(decoder.norm))))
        return left

    def _pass(self, one: OneBlock) -> None:
        with torch.no_grad():
            for hidden in self.hidden:
                hidden.copy_(one(hidden))

    def _enter(self, tokens: Tensor) -> Tensor:
        """What the first block is called with."""
        decoder = decoder_of(self.lm.model)
        self.lm.read_(decoder.embed_tokens, "model.embed_tokens")
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            raise _Seen

        hook = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                decoder(tokens.to(decoder.embed_tokens.weight.device), use_cache=False)
        except _Seen:
            pass
        finally:
            hook.remove()
        args, kwargs = seen[0]
        if len(args) != 1:
            raise InputError(
                f"{type(self.lm.model).__name__} calls its blocks with {len(args)} arguments, not with one"
            )
        self._arguments.setdefault(
            len(tokens), {key: value for key, value in kwargs.items() if key != "past_key_values"}
        )
        hidden: Tensor = args[0]
        # Pinned, a GPU reads it ten times as fast; each block's inputs are read several times.
        waiting = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=self.device.type == "cuda")
        return waiting.copy_(hidden)


class _Seen(Exception):
    """The first block was reached."""


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    return tuple(_moved(part, device) for part in value) if isinstance(value, tuple) else value
