"""TRL's GRPO trainer with completions of our engine: how far they are from the policy is measured, and corrected.

TRL has that for vLLM alone. What it needs is there as soon as completions come with the log-probabilities that they
were sampled at, so scoring is told that they do, and sampling is not. The trainer then computes the policy's own once
more before each update, logs their difference as ``sampling/sampling_logp_difference`` and weighs each token by the
truncated ratio of both (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from trl.trainer.grpo_trainer import GRPOTrainer

from rlquant.errors import InputError
from rlquant.llm.sampling import Rollouts

__all__ = ["EngineGRPOTrainer", "GRPORollouts", "sampling_arguments"]


GRPORollouts = Rollouts | Literal["vllm"]


def sampling_arguments(rollouts: str, cap: float | None) -> dict[str, Any]:
    """Arguments of ``GRPOConfig``.

    Args:
        rollouts: what samples. vLLM does in this process, as TRL runs it, with weights of its own.
        cap: weights of tokens go up to it; None measures, and leaves them at 1, nearly.

    Raises:
        InputError: vLLM is not installed.
    """
    bounds = (
        {"clip_min": 1.0, "clip_max": 1.0 + 2.0**-20} if cap is None else {"clip_min": 0.0, "clip_max": cap}
    )
    named = {f"vllm_importance_sampling_{key}": value for key, value in bounds.items()}
    found = {"vllm_importance_sampling_mode": "token_truncate", **named}
    if rollouts != "vllm":
        return found
    if importlib.util.find_spec("vllm") is None:
        raise InputError("rollouts = 'vllm' needs the package vllm: pip install vllm, or take rollouts=auto")
    return {**found, "use_vllm": True, "vllm_mode": "colocate"}


class EngineGRPOTrainer(GRPOTrainer):
    """With a ``rollout_func`` that gives log-probabilities; its arguments include :func:`sampling_arguments`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_vllm = True  # which from here on means: completions have log-probabilities

    def _generate(self, prompts: list[Any]) -> Any:
        self.use_vllm = False
        try:
            return super()._generate(prompts)
        finally:
            self.use_vllm = True
