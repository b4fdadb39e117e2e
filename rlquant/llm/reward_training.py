"""Training a reward model with TRL's trainer on a packed base, and from its classifier to the role that PPO reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.adapter_layer import named_as_peft_does
from rlquant.llm.adapters import AdapterSettings, lora_config
from rlquant.llm.data import prompt_text
from rlquant.llm.heads import ScoreHead
from rlquant.llm.load import transformers_module
from rlquant.llm.model import LanguageModel
from rlquant.llm.reward_model import right_padded, write_reward_model
from rlquant.llm.training import ADAPTER
from rlquant.quant import eval_mode

__all__ = ["pair_rewards", "pair_texts", "reward_trainer", "save_trained_reward"]

_SCORE = "score"


def reward_trainer(trainer: type[Any], lm: LanguageModel, settings: AdapterSettings, **arguments: Any) -> Any:
    """TRL's ``RewardTrainer`` on ``lm``'s own decoder, with a new adapter and a head in float32.

    Raises:
        InputError: transformers has no classifier of this architecture, or a LoftQ start is asked for.
    """
    if settings.init == "loftq":
        raise InputError("adapters.init = 'loftq' is not built for reward models: take zero")
    model = _classifier(lm, settings.seed)
    config = lora_config(lm.model, settings)
    config.task_type, config.modules_to_save = "SEQ_CLS", [_SCORE]
    with torch.random.fork_rng(devices=[]), named_as_peft_does(model):
        return trainer(model=model, peft_config=config, processing_class=lm.tokenizer, **arguments)


def pair_texts(lm: LanguageModel, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Preference pairs as two texts each: what the policy reads and what it answers, without an end; TRL adds that."""
    found = []
    for row in rows:
        prompt = prompt_text(row["prompt"], lm.tokenizer)
        found.append({key: prompt + _answer_text(row[key]) for key in ("chosen", "rejected")})
    return found


@torch.no_grad()
def pair_rewards(
    model: Any, lm: LanguageModel, texts: Sequence[Mapping[str, str]], *, batch: int = 8
) -> NDArray[np.float64]:
    """Scores of the chosen and the rejected text of each pair, float64 ``[n, 2]``."""
    every = [text[key] for text in texts for key in ("chosen", "rejected")]
    scores: list[float] = []
    with eval_mode(model):
        for start in range(0, len(every), batch):
            read = [
                [*lm.tokens(text), lm.tokenizer.eos_token_id][-lm.longest :]
                for text in every[start : start + batch]
            ]
            ids, mask = right_padded(read, lm.device)
            ids = ids.masked_fill(~mask, lm.tokenizer.pad_token_id)
            scores += model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].double().tolist()
    return np.array(scores).reshape(-1, 2)


def save_trained_reward(model: Any, lm: LanguageModel, folder: str | Path) -> None:
    """Write what :func:`reward_trainer` trained as a reward model that roles load, see ``reward_model.py``.

    The model still scores afterwards; it can be trained no more.
    """
    classifier = model.get_base_model()
    trained = classifier.score.modules_to_save[ADAPTER]
    classifier.score = trained  # not PEFT's wrapper, which it would write into the adapter
    head = ScoreHead(trained.weight.shape[1], seed=None)
    head.weight.data.copy_(trained.weight.data[0])
    config = model.peft_config[ADAPTER]
    config.task_type, config.modules_to_save = "CAUSAL_LM", None  # the head has a file of its own
    write_reward_model(model, ADAPTER, head, lm, folder)


def _classifier(lm: LanguageModel, seed: int) -> Any:
    """A sequence classifier whose decoder is the base's, and whose head is float32."""
    transformers = transformers_module()
    config = lm.model.config.__class__.from_dict(json.loads(lm.model.config.to_json_string()))
    config.num_labels = 1
    config.pad_token_id = lm.tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise InputError(
            f"transformers has no sequence classifier of {config.model_type}: take another base"
        ) from None
    model.model = lm.model.model
    head = _FloatLinear(config.hidden_size, 1, bias=False)
    head.weight.data.copy_(ScoreHead(config.hidden_size, seed=seed).weight.data[None])
    model.score = head.to(lm.device)
    return model


class _FloatLinear(nn.Linear):
    """The classifier's head on hidden states of any dtype, under autocast or not."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


def _answer_text(answer: Any) -> str:
    return answer if isinstance(answer, str) else "".join(turn["content"] for turn in answer)
