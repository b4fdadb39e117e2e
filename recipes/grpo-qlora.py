"""GRPO on a 4-bit base: of several answers to a prompt, those that earn more than their mean become likelier.

    rlquant run grpo-qlora data=prompts.jsonl reward=check.py:score

Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300), by TRL's trainer, with LoRA adapters in float32 on a base that is
quantized once and never changes; with adapters off it is the reference. Rewards and data: as of ppo-qlora.

In the end, on prompts that were held out: the mean reward of sampled answers before and after, and what the merged and
quantized model keeps of the gain (results.json, report.html), answers to compare (samples.md), and the adapter.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from pydantic import Field
from trl import GRPOConfig, GRPOTrainer

from rlquant.config import Section
from rlquant.gains import publish_gain
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.backbone import BaseSettings, load_backbone, token_counter
from rlquant.llm.decode.cache import CacheScheme
from rlquant.llm.engine_sampler import DENSE, settled
from rlquant.llm.examples import DataSettings, read_examples, require_data
from rlquant.llm.finish import compare_models, reward_scorer, write_samples
from rlquant.llm.grpo import EngineGRPOTrainer, EngineRollouts, GRPORollouts, sampling_arguments
from rlquant.llm.memory import Workload
from rlquant.llm.merge import MergeSettings
from rlquant.llm.rewards import load_reward, reward_for_trl
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import Reward, planned_rollouts, refuse_cache, with_prompt_text
from rlquant.llm.sampling import KV_CACHE, ROLLOUTS
from rlquant.llm.training import TrainSettings, adapted, fit, require_memory, trainer_arguments
from rlquant.runs import RunFolder

SEVERAL_PROCESSES = True
KNOBS = {
    "batch": "train.batch=",
    "seq": "data.max_prompt and new_tokens of together ",
    "rollout": "train.batch times train.accumulate of ",
}


class Config(Section):
    """Settings of this recipe."""

    model: BaseSettings = BaseSettings()
    data: DataSettings
    reward: str | dict[str, float] = Field(
        description="FILE.py:FUNCTION, a reward model's folder, or weights of several"
    )
    adapters: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings(lr=1e-5, batch=8, accumulate=1)
    answers: int = Field(8, ge=2, description="to each prompt; divides train.batch times train.accumulate")
    new_tokens: int = Field(128, ge=1, description="of an answer")
    rollouts: GRPORollouts = Field("auto", description=f"{ROLLOUTS}; vllm: by TRL")
    kv_cache: CacheScheme | None = Field(None, description=KV_CACHE)
    importance_cap: float | None = Field(
        None, gt=0, description="truncated importance weights of rlquant's rollouts; null: none"
    )
    temperature: float = Field(1.0, gt=0, description="of sampling")
    beta: float = Field(0.04, ge=0, description="of the KL penalty to the base; TRL's own default is 0")
    samples: int = Field(4, ge=1, description="answers to each held-out prompt")
    merge: MergeSettings | None = MergeSettings()

    @property
    def workload(self) -> Workload:
        """For the planner."""
        length, new = self.data.max_prompt + self.new_tokens, self.new_tokens
        rollouts = planned_rollouts(self.rollouts, self.kv_cache)
        return self.train.workload("grpo", seq=length, rank=self.adapters.rank, completion=new, **rollouts)


def main(config: Config, run: RunFolder) -> None:
    """Learn, compare, merge."""
    require_data(config.data)
    require_memory(config.model, config.workload, KNOBS)
    base = load_backbone(config.model)
    lm = base.lm
    data = read_examples(config.data, "prompts", token_counter(lm))
    train, held_out = (with_prompt_text(lm, rows) for rows in (data.train, data.held_out))
    arguments = GRPOConfig(
        **trainer_arguments(config.train, config.model, run),
        num_generations=config.answers,
        max_completion_length=config.new_tokens,
        temperature=config.temperature,
        top_p=1.0,
        top_k=0,
        beta=config.beta,
        **sampling_arguments(config.rollouts, config.importance_cap),
    )
    # Loaded once the trainer has put its adapter on, since a reward model joins the same base.
    loaded: list[Reward] = []

    def reward(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> Sequence[float]:
        return loaded[0](prompts, completions, rows)

    roll_out, kind = None, GRPOTrainer
    rollouts = settled(config.rollouts, lm.model)
    if not rollouts.startswith("rlquant"):
        refuse_cache(config.kv_cache)
    else:
        kind = EngineGRPOTrainer
        roll_out = EngineRollouts(
            lm,
            max_new_tokens=config.new_tokens,
            temperature=config.temperature,
            seed=config.train.seed,
            dense=DENSE.get(rollouts),
            cache=config.kv_cache,
        )
    trainer = adapted(
        kind,
        lm,
        config.adapters,
        args=arguments,
        reward_funcs=reward_for_trl(reward, {row["prompt"]: row for row in train}),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in train]),
        rollout_func=roll_out,
    )
    loaded.append(load_reward(config.reward, lambda: Roles(lm.but(model=trainer.model))))
    learned = fit(trainer, run, config.train, lm.model)
    if roll_out is not None:
        roll_out.release()  # models are compared by engines of their own
    outcome = compare_models(
        run,
        base,
        trainer.model,
        config.model,
        scorer=reward_scorer(held_out, reward, new_tokens=config.new_tokens, samples=config.samples),
        task="grpo",
        score="mean reward",
        sample="prompt",
        merge=config.merge,
        calibration=train,
        new_tokens=config.new_tokens,
    )
    samples = write_samples(run, lm, trainer.model, held_out, new_tokens=config.new_tokens)
    publish_gain(run, lm, config, outcome, {**learned, "left_out": data.left_out}, samples)
