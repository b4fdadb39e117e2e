"""Supervised fine-tuning on a 4-bit base: imitate answers, conversations or text.

    rlquant run sft-qlora data=chats.jsonl
    rlquant run sft-qlora data=squad.jsonl data.columns='{prompt: question, completion: answer}' train.epochs=2

By TRL's trainer, with LoRA adapters in float32 on a base that is quantized once and never changes (Dettmers et al.
2023, QLoRA, arXiv:2305.14314). Where rows have a prompt, only the answer is learned. Data: JSONL, JSON, CSV, Parquet or
a Hub dataset of messages, of prompt and completion, or of text.

In the end, on prompts that were held out: the log-probability of the answers before and after, and what the merged and
quantized model keeps of the gain (results.json, report.html), answers to compare (samples.md), and the adapter.
"""

from functools import partial

from datasets import Dataset
from pydantic import Field
from trl import SFTConfig, SFTTrainer

from rlquant.config import Section
from rlquant.errors import InputError
from rlquant.gains import publish_gain
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.backbone import BaseSettings, float_weights, load_backbone, token_counter
from rlquant.llm.examples import DataSettings, read_examples, require_data
from rlquant.llm.finish import compare_models, divergence_from_base, text_scorer, write_samples
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
    train: TrainSettings = TrainSettings(lr=2e-4)
    packing: bool = Field(
        False, description="join short texts up to data.max_length; for text without prompts"
    )
    merge: MergeSettings | None = MergeSettings()

    @property
    def workload(self) -> Workload:
        """For the planner."""
        return self.train.workload("sft", seq=self.data.max_length, rank=self.adapters.rank)


def main(config: Config, run: RunFolder) -> None:
    """Learn, compare, merge."""
    require_data(config.data)
    if config.adapters.init == "loftq" and config.merge is not None and config.merge.onto == "original":
        raise InputError(
            "an adapter of adapters.init=loftq belongs to the quantized base: set merge.onto=dequantized"
        )
    require_memory(config.model, config.workload)
    base = load_backbone(config.model)
    data = read_examples(config.data, "texts", token_counter(base.lm))
    arguments = SFTConfig(
        **trainer_arguments(config.train, config.model, run),
        max_length=config.data.max_length,
        packing=config.packing,
    )
    trainer = adapted(
        SFTTrainer,
        base.lm,
        config.adapters,
        weights=partial(float_weights, config.model),
        args=arguments,
        train_dataset=Dataset.from_list(data.train),
    )
    learned = fit(trainer, run, config.train, base.lm.model)
    outcome = compare_models(
        run,
        base,
        trainer.model,
        config.model,
        scorer=text_scorer(data.held_out, config.data.max_length),
        task="sft",
        score="log-probability of an answer's token, in nats",
        sample="row",
        merge=config.merge,
        calibration=data.train,
    )
    samples = write_samples(run, base.lm, trainer.model, data.held_out)
    divergence = divergence_from_base(base.lm, trainer.model, data.held_out, config.data.max_length)
    facts = {**learned, "kl_to_base": divergence, "left_out": data.left_out}
    publish_gain(run, base.lm, config, outcome, facts, samples)
