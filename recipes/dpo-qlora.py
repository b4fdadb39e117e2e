"""DPO on a 4-bit base: answers that people preferred become likelier, those that they rejected less likely.

    rlquant run dpo-qlora data=pairs.jsonl
    rlquant run dpo-qlora --config dpo-qlora-4gb data=pairs.jsonl model=HuggingFaceTB/SmolLM2-135M-Instruct

Rafailov et al. 2023 (arXiv:2305.18290), by TRL's trainer. The base is quantized once and never changes; LoRA adapters
in float32 learn on it, and with adapters off it is its own reference. Data: JSONL, JSON, CSV, Parquet or a Hub dataset
of prompt, chosen and rejected (text or chat messages), or dialogues as those of hh-rlhf.

In the end, on prompts that were held out: how often the chosen answer is likelier, before and after, and what the
merged and quantized model keeps of the gain (results.json, report.html), answers to compare (samples.md), the adapter.
"""

from datasets import Dataset
from pydantic import Field
from trl import DPOConfig, DPOTrainer

from rlquant.config import Section
from rlquant.gains import publish_gain
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.backbone import BaseSettings, load_backbone, token_counter
from rlquant.llm.examples import DataSettings, read_examples, require_data
from rlquant.llm.finish import compare_models, divergence_from_base, pair_scorer, write_samples
from rlquant.llm.memory import Workload
from rlquant.llm.merge import MergeSettings
from rlquant.llm.training import TrainSettings, adapted, fit, require_memory, trainer_arguments
from rlquant.runs import RunFolder

SEVERAL_PROCESSES = True


class Config(Section):
    """Settings of this recipe."""

    model: BaseSettings = BaseSettings()
    data: DataSettings
    adapters: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings(lr=5e-6)
    beta: float = Field(0.1, gt=0, description="how dearly a step away from the base is paid for")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of preferences that may be wrong")
    merge: MergeSettings | None = MergeSettings()

    @property
    def workload(self) -> Workload:
        """For the planner."""
        return self.train.workload("dpo", seq=self.data.max_length, rank=self.adapters.rank)


def main(config: Config, run: RunFolder) -> None:
    """Learn, compare, merge."""
    require_data(config.data)
    require_memory(config.model, config.workload)
    base = load_backbone(config.model)
    data = read_examples(config.data, "pairs", token_counter(base.lm))
    arguments = DPOConfig(
        **trainer_arguments(config.train, config.model, run),
        beta=config.beta,
        loss_type=["robust"] if config.label_smoothing else ["sigmoid"],
        label_smoothing=config.label_smoothing,
        max_length=config.data.max_length,
    )
    trainer = adapted(
        DPOTrainer, base.lm, config.adapters, args=arguments, train_dataset=Dataset.from_list(data.train)
    )
    learned = fit(trainer, run, config.train, base.lm.model)
    outcome = compare_models(
        run,
        base,
        trainer.model,
        config.model,
        scorer=pair_scorer(data.held_out, config.data.max_length),
        task="dpo",
        score="share of pairs whose chosen answer is likelier than the rejected one",
        sample="pair",
        merge=config.merge,
        calibration=data.train,
    )
    samples = write_samples(run, base.lm, trainer.model, data.held_out)
    divergence = divergence_from_base(base.lm, trainer.model, data.held_out, config.data.max_length)
    facts = {**learned, "kl_to_base": divergence, "left_out": data.left_out}
    publish_gain(run, base.lm, config, outcome, facts, samples)
