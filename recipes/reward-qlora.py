"""A reward model on a 4-bit base: it learns which of two answers people preferred, and scores any answer from then on.

    rlquant run reward-qlora data=pairs.jsonl

Bradley and Terry's loss on pairs (Ouyang et al. 2022, arXiv:2203.02155), by TRL's trainer: adapters and a head in
float32 on a base that is quantized once and never changes. Data: as of dpo-qlora.

The folder ``reward`` is what ppo-qlora and grpo-qlora read by ``reward=runs/reward-qlora/reward``. In the end, on
prompts that were held out: how often the chosen answer scores higher, before and after (results.json, report.html).
"""

import numpy as np
from datasets import Dataset
from pydantic import Field
from trl import RewardConfig, RewardTrainer

from rlquant.config import Section
from rlquant.gains import publish_gain
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.backbone import BaseSettings, load_backbone, token_counter
from rlquant.llm.examples import DataSettings, read_examples, require_data
from rlquant.llm.memory import Workload
from rlquant.llm.outcome import Contender, Outcome
from rlquant.llm.reward_training import pair_rewards, pair_texts, reward_trainer, save_trained_reward
from rlquant.llm.training import TrainSettings, fit, require_memory, trainer_arguments
from rlquant.runs import RunFolder

SEVERAL_PROCESSES = True


class Config(Section):
    """Settings of this recipe."""

    model: BaseSettings = BaseSettings()
    data: DataSettings
    adapters: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings(lr=1e-4)
    centre: float | None = Field(
        0.01, ge=0, description="how much scores are drawn to zero (Eisenstein et al. 2023)"
    )

    @property
    def workload(self) -> Workload:
        """For the planner."""
        return self.train.workload("reward", seq=self.data.max_length, rank=self.adapters.rank)


def main(config: Config, run: RunFolder) -> None:
    """Learn, compare."""
    require_data(config.data)
    require_memory(config.model, config.workload)
    base = load_backbone(config.model)
    data = read_examples(config.data, "pairs", token_counter(base.lm))
    arguments = RewardConfig(
        **trainer_arguments(config.train, config.model, run),
        max_length=config.data.max_length + 1,  # and the end
        center_rewards_coefficient=config.centre,
    )
    texts = pair_texts(base.lm, data.train)
    trainer = reward_trainer(
        RewardTrainer, base.lm, config.adapters, args=arguments, train_dataset=Dataset.from_list(texts)
    )
    held_out = pair_texts(base.lm, data.held_out)
    kept = run.piece("before") or {"scores": pair_rewards(trainer.model, base.lm, held_out).tolist()}
    run.save_piece("before", kept)
    before = np.array(kept["scores"])
    learned = fit(trainer, run, config.train, base.lm.model)
    after = pair_rewards(trainer.model, base.lm, held_out)
    save_trained_reward(trainer.model, base.lm, run.path / "reward")
    size = base.weights + sum(each.numel() * 4 for each in trainer.model.parameters() if each.requires_grad)
    outcome = Outcome(
        task="reward",
        score="share of pairs whose chosen answer scores higher",
        sample="pair",
        base=_contender(config.model.precision, "none", before, base.weights),
        tuned=_contender(f"{config.model.precision}+lora", "reward", after, size),
    )
    publish_gain(
        run, base.lm, config, outcome, {**learned, "left_out": data.left_out}, _table(held_out, after)
    )


def _contender(precision: str, method: str, scores: np.ndarray, weights: int) -> Contender:
    margin = {"margin": float((scores[:, 0] - scores[:, 1]).mean())}
    return Contender(precision, method, (scores[:, 0] > scores[:, 1]).astype(np.float64), weights, margin)


def _table(texts: list[dict[str, str]], scores: np.ndarray) -> str:
    """The first held-out pairs and their scores, in Markdown."""
    lines = ["| chosen | its score | rejected | its score |", "|---|---|---|---|"]
    for text, (chosen, rejected) in zip(texts[:4], scores, strict=False):
        cells = (" ".join(text[key][-200:].split()).replace("|", "\\|") for key in ("chosen", "rejected"))
        good, bad = cells
        lines.append(f"| {good} | {chosen:.2f} | {bad} | {rejected:.2f} |")
    return "\n".join(lines) + "\n"
