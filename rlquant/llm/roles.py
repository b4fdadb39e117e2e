"""One immutable base, many roles: policy, reference, reward model and critic are adapters and small heads on it.

The reference is the base with its adapters off, unless an adapter ``reference`` says otherwise (an SFT adapter that the
policy started from, or a copy of the policy where LoftQ's start is no zero). There is no second copy of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError, unknown_name
from rlquant.llm.adapters import (
    AdapterSettings,
    active_adapter,
    adapter_parameters,
    add_adapter,
    base_hash,
    base_model,
    checkpoint_blocks_,
    load_adapter,
)
from rlquant.llm.attention import avoid_cudnn_attention
from rlquant.llm.heads import ScoreHead
from rlquant.llm.log_probabilities import CHUNK, token_log_probs
from rlquant.llm.model import LanguageModel, decoder_blocks, decoder_of

__all__ = ["ROLES", "Roles", "positions"]

ROLES = ("policy", "reference", "reward", "critic")
_SCALED_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Roles:
    """The roles on one base.

    Args:
        lm: the base, quantized or not; it is frozen with the first role.
        checkpointing: recompute blocks in the backward pass, which saves most of the activations' memory.

    Attributes:
        heads: of the reward model and the critic, by role; float32.

    Every batch is ``ids`` int64 and ``mask`` bool (or 0/1), ``[batch, tokens]``; padding may lie at either end, and is
    told by the mask alone, so that any token may stand there.
    """

    def __init__(self, lm: LanguageModel, *, checkpointing: bool = False) -> None:
        for name in _SCALED_LOGITS:
            if getattr(lm.model.config, name, None) not in (None, 1, 1.0):
                raise InputError(
                    f"{lm.source} bends its logits ({name}), which log-probabilities in chunks do not follow: take "
                    "a model of the Llama, Qwen or Mistral family"
                )
        decoder_of(base_model(lm.model))
        avoid_cudnn_attention()
        self.lm = lm
        self.heads: dict[str, ScoreHead] = {}
        self._checkpointing = checkpointing

    @property
    def model(self) -> Any:
        """The model with its adapters."""
        return self.lm.model

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that there are."""
        return tuple(getattr(self.model, "peft_config", ()))

    def add(self, role: str, settings: AdapterSettings, *, weights: Any = None) -> None:
        """Add a role that is trained: an adapter, and a head for the reward model and the critic.

        Raises InputError as :func:`~rlquant.llm.adapters.add_adapter`, and for a role that is none.
        """
        self._check(role)
        self._took(add_adapter(self.model, role, settings, weights=weights))
        if role in ("reward", "critic"):
            seed = settings.seed if role == "reward" else None
            self.heads[role] = ScoreHead(self._size, seed=seed).to(self.lm.device)

    def load(self, role: str, folder: str | Path, *, trainable: bool = False) -> None:
        """Take a role's adapter from a folder; a critic's head starts at zero.

        A reward model has a head in its folder, see :func:`~rlquant.llm.reward_model.load_reward_model`.
        """
        self._check(role)
        self._took(load_adapter(self.model, role, folder, trainable=trainable))
        if role == "critic":
            self.heads[role] = ScoreHead(self._size, seed=None).to(self.lm.device)

    def parameters(self, role: str) -> dict[str, nn.Parameter]:
        """What is trained for a role, by name: its adapter's parameters and its head's."""
        found = adapter_parameters(self.model, role)
        if role in self.heads:
            found |= {f"head.{name}": each for name, each in self.heads[role].named_parameters()}
        return found

    def base_hash(self) -> str:
        """See :func:`~rlquant.llm.adapters.base_hash`."""
        return base_hash(self.model)

    def acting(self, role: str) -> AbstractContextManager[None]:
        """The model as a role, for as long as the context lasts: to generate, say."""
        if role == "reference":
            return active_adapter(self.model, role if role in self.adapters else None)
        if role not in self.adapters:
            raise unknown_name("role", role, (*self.adapters, "reference"))
        return active_adapter(self.model, role)

    def hidden(self, role: str, ids: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states of a role, after the last norm: ``[batch, tokens, size]`` in the model's dtype."""
        decoder = decoder_of(base_model(self.model))
        with self.acting(role), self._recomputing():
            out = decoder(
                input_ids=ids, attention_mask=mask.long(), position_ids=positions(mask), use_cache=False
            )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def log_probs(
        self,
        role: str,
        ids: Tensor,
        mask: Tensor,
        *,
        last: int,
        temperature: float = 1.0,
        chunk: int = CHUNK,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities, in nats, of the last ``last`` tokens, and entropies: float32 ``[batch, last]`` each.

        Padding among them gets numbers without meaning: mask them. See
        :func:`~rlquant.llm.log_probabilities.token_log_probs`.
        """
        hidden = self.hidden(role, ids, mask)[:, -last - 1 : -1]
        head = base_model(self.model).get_output_embeddings()
        return token_log_probs(hidden, head, ids[:, -last:], temperature=temperature, chunk=chunk)

    def policy(self, ids: Tensor, mask: Tensor, *, last: int, temperature: float = 1.0) -> Tensor:
        """:meth:`log_probs` of the policy, without the entropies."""
        return self.log_probs("policy", ids, mask, last=last, temperature=temperature)[0]

    def reference(self, ids: Tensor, mask: Tensor, *, last: int, temperature: float = 1.0) -> Tensor:
        """:meth:`log_probs` of the reference, without gradients."""
        with torch.no_grad():
            return self.log_probs("reference", ids, mask, last=last, temperature=temperature)[0]

    def values(self, ids: Tensor, mask: Tensor, *, last: int) -> Tensor:
        """The critic's value of the state before each of the last ``last`` tokens: float32 ``[batch, last]``."""
        values: Tensor = self._head("critic")(self.hidden("critic", ids, mask)[:, -last - 1 : -1])
        return values

    def rewards(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The reward model's score at the last token that counts: float32 ``[batch]``."""
        hidden = self.hidden("reward", ids, mask)
        places = torch.arange(ids.shape[1], device=ids.device)
        last = (places * mask.long()).argmax(dim=1)
        scores: Tensor = self._head("reward")(hidden[torch.arange(len(ids), device=ids.device), last])
        return scores

    @property
    def _size(self) -> int:
        return int(base_model(self.model).config.hidden_size)

    def _head(self, role: str) -> ScoreHead:
        if role not in self.heads:
            raise InputError(f"there is no {role} yet: add one or load one")
        return self.heads[role]

    def _check(self, role: str) -> None:
        if role not in ROLES:
            raise unknown_name("role", role, ROLES)

    def _took(self, model: Any) -> None:
        first = model is not self.model
        self.lm = self.lm.but(model=model)
        if first and self._checkpointing:
            checkpoint_blocks_(model)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Blocks in training mode, not what is in them: checkpointing asks for it, and dropout stays as it is."""
        blocks = decoder_blocks(base_model(self.model)) if self._checkpointing else []
        before = [block.training for block in blocks]
        for block in blocks:
            block.training = True
        try:
            yield
        finally:
            for block, training in zip(blocks, before, strict=True):
                block.training = training


def positions(mask: Tensor) -> Tensor:
    """Place of each token in its sequence, int64 ``[batch, tokens]``, whichever end is padded; 0 before the first."""
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)
