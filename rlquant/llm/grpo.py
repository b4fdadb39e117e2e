"""TRL's GRPO trainer with completions of our engine: how far they are from the policy is measured, and corrected.

TRL has that for vLLM alone. What it needs is there as soon as completions come with the log-probabilities that they
were sampled at. Where tokens are to be weighed by the truncated ratio of both (Yao et al. 2025, "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training"), scoring is told that they do, and sampling is not: the trainer
computes the policy's own once more before each update. Where they are measured only, those of the update serve. Either
way their difference is logged as ``sampling/sampling_logp_difference``.
"""

from __future__ import annotations

import importlib.util
import zlib
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from rlquant.errors import InputError
from rlquant.llm.dense_policy import Dense
from rlquant.llm.engine_sampler import EngineSampler
from rlquant.llm.model import LanguageModel
from rlquant.llm.rollout import eos_ids
from rlquant.llm.sampling import Rollouts, Sampling
from rlquant.quant import eval_mode

__all__ = ["EngineGRPOTrainer", "EngineRollouts", "GRPORollouts", "sampling_arguments"]

GRPORollouts = Rollouts | Literal["vllm"]


def sampling_arguments(rollouts: str, cap: float | None) -> dict[str, Any]:
    """Arguments of ``GRPOConfig``.

    Args:
        rollouts: what samples. vLLM does in this process, as TRL runs it, with weights of its own.
        cap: weights of tokens go up to it; None measures, and leaves them at 1.

    Raises:
        InputError: vLLM is not installed.
    """
    if cap is None and rollouts != "vllm":
        return {"vllm_importance_sampling_correction": False}
    # Nearly 1, where TRL's own way of measuring is to weigh.
    low, high = (1.0, 1.0 + 2.0**-20) if cap is None else (0.0, cap)
    found = {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }
    if rollouts != "vllm":
        return found
    if importlib.util.find_spec("vllm") is None:
        raise InputError("rollouts = 'vllm' needs the package vllm: pip install vllm, or take rollouts=auto")
    return {**found, "use_vllm": True, "vllm_mode": "colocate"}


class EngineRollouts:
    """The ``rollout_func`` of TRL's ``GRPOTrainer``: completions by :class:`~rlquant.llm.engine.Engine`.

    Prompts are text, repeated for each completion; those of a group are read once. Every step and process has a seed of
    its own, so that a resumed run samples as the uninterrupted one.

    Args:
        lm: whose model the trainer adapts.
        max_new_tokens: of a completion.
        temperature: of the sampling; greater than 0.
        seed: of the run.
        dense, cache: see :class:`~rlquant.llm.engine_sampler.EngineSampler`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        dense: Dense | None = None,
        cache: str | None = None,
    ) -> None:
        self._lm, self._seed, self._ends = lm, seed, eos_ids(lm)
        self._sampler_of = partial(
            EngineSampler,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature),
            dense=dense,
            cache=cache,
        )
        self._sampler: EngineSampler | None = None

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """What TRL asks of a ``rollout_func``."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._sampler is None:
            self._sampler = self._sampler_of(model)
        ids = [self._lm.tokens(prompt) for prompt in prompts]
        turn = f"{self._seed}/{trainer.state.global_step}/{trainer.accelerator.process_index}"
        with eval_mode(model):
            made = self._sampler(ids, stop=self._ends, seed=zlib.crc32(turn.encode()))
        return {
            "prompt_ids": ids,
            "completion_ids": [each.ids for each in made],
            "logprobs": [each.log_probs for each in made],
        }

    def release(self) -> None:
        """Give back the memory of cache, graphs and dense weights; the next call takes it again."""
        self._sampler = None


class EngineGRPOTrainer(GRPOTrainer):
    """With a ``rollout_func`` that gives log-probabilities; its arguments include :func:`sampling_arguments`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._off: list[Tensor] = []
        self._weighs = bool(self.args.vllm_importance_sampling_correction)
        # From here on it means: tokens are weighed by their log-probabilities.
        self.use_vllm = self._weighs

    def _generate(self, prompts: list[Any]) -> Any:
        self.use_vllm = False
        try:
            return super()._generate(prompts)
        finally:
            self.use_vllm = self._weighs

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._latest = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        loss = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
        if model.training and not self._weighs:
            # The policy of the update is the one that sampled: nothing is computed for this alone.
            sampled, completed = inputs["sampling_per_token_logps"], inputs["completion_mask"].bool()
            self._off.append((self._latest - sampled)[completed])
            if self.accelerator.sync_gradients:  # the last batch of an optimizer step
                self._measure(torch.cat(self._off))
                self._off.clear()
        return loss

    def _measure(self, off: Tensor) -> None:
        """Log what the mismatch of a step's tokens comes to; float32 ``[tokens]``, policy less sampler."""
        if not len(off):
            return
        found = {
            "sampling_logp_difference/mean": off.abs().mean(),
            "sampling_logp_difference/max": off.abs().amax(),
            "importance_sampling_ratio/mean": off.exp().mean(),
            "kl": (off.expm1() - off).mean(),  # of the sampler to the policy, k3 of Schulman 2020
        }
        seen = self.accelerator.gather(torch.stack(list(found.values()))[None])
        for number, name in enumerate(found):
            column = seen[:, number]
            value = column.amax() if name.endswith("max") else column.mean()
            self._metrics["train"][f"sampling/{name}"].append(value.item())
