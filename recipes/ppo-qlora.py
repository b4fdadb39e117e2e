"""PPO on a 4-bit base: policy, reference, critic and reward model are adapters and heads on one frozen model.

    rlquant run ppo-qlora data=prompts.jsonl reward=check.py:score
    rlquant run ppo-qlora data=prompts.jsonl reward=runs/reward-qlora/reward

Ouyang et al. 2022 (arXiv:2203.02155), with the details that matter of Huang et al. 2023 (rlquant/llm/ppo.py has them).
The reward is a function ``(prompts, completions, rows) -> numbers`` in a Python file, a reward model's folder, or
several with weights: ``reward='{check.py:score: 1, runs/reward-qlora/reward: 0.5}'``. Data: rows with a prompt and
whatever the reward needs.

In the end, on prompts that were held out: the mean reward of sampled answers before and after, and what the merged and
quantized model keeps of the gain (results.json, report.html), answers to compare (samples.md), and the adapter.
"""

from pydantic import Field

from rlquant.config import Section
from rlquant.gains import publish_gain
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.backbone import BaseSettings, load_backbone, token_counter
from rlquant.llm.examples import DataSettings, read_examples, require_data
from rlquant.llm.finish import compare_models, reward_scorer, write_samples
from rlquant.llm.memory import Workload
from rlquant.llm.merge import MergeSettings
from rlquant.llm.ppo import PPO, PPOSettings
from rlquant.llm.ppo_run import run_ppo
from rlquant.llm.reporting import Report, check_report
from rlquant.llm.rewards import load_reward
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import planned_rollouts, with_prompt_text
from rlquant.llm.training import require_memory
from rlquant.runs import RunFolder

KNOBS = {
    "batch": "ppo.microbatch=",
    "seq": "data.max_prompt and ppo.max_new_tokens of together ",
    "rollout": "ppo.batch=",
}


class Config(Section):
    """Settings of this recipe."""

    model: BaseSettings = BaseSettings()
    data: DataSettings
    reward: str | dict[str, float] = Field(
        description="FILE.py:FUNCTION, a reward model's folder, or weights of several"
    )
    adapters: AdapterSettings = AdapterSettings()
    ppo: PPOSettings = PPOSettings()
    checkpointing: bool = Field(
        True, description="recompute activations: a third more work, much less memory"
    )
    report: Report = "none"
    save_every: int = Field(10, ge=1, description="steps from checkpoint to checkpoint")
    samples: int = Field(4, ge=1, description="answers to each held-out prompt")
    merge: MergeSettings | None = MergeSettings()

    @property
    def workload(self) -> Workload:
        """For the planner."""
        ppo, new = self.ppo, self.ppo.max_new_tokens
        return Workload(
            task="ppo",
            batch=ppo.microbatch or ppo.minibatch,
            rollout=ppo.batch,
            **planned_rollouts(ppo.rollouts, ppo.kv_cache),
            seq=self.data.max_prompt + new,
            completion=new,
            rank=self.adapters.rank,
            checkpointing=self.checkpointing,
        )


def main(config: Config, run: RunFolder) -> None:
    """Learn, compare, merge."""
    require_data(config.data)
    check_report(config.report)
    require_memory(config.model, config.workload, KNOBS)
    base = load_backbone(config.model)
    lm = base.lm
    data = read_examples(config.data, "prompts", token_counter(lm))
    train, held_out = (with_prompt_text(lm, rows) for rows in (data.train, data.held_out))
    roles = Roles(lm, checkpointing=config.checkpointing)
    for role in ("policy", "critic"):
        roles.add(role, config.adapters)
    reward = load_reward(config.reward, lambda: roles)
    ppo = PPO(roles, train, reward, config.ppo)
    learned = run_ppo(ppo, run, every=config.save_every, report=config.report)
    del ppo  # with what its sampler and its optimizer hold
    outcome = compare_models(
        run,
        base,
        roles.model,
        config.model,
        scorer=reward_scorer(held_out, reward, new_tokens=config.ppo.max_new_tokens, samples=config.samples),
        task="ppo",
        score="mean reward",
        sample="prompt",
        merge=config.merge,
        calibration=train,
        new_tokens=config.ppo.max_new_tokens,
        adapter="policy",
    )
    samples = write_samples(run, lm, roles.model, held_out, new_tokens=config.ppo.max_new_tokens)
    facts = {**learned, "left_out": data.left_out}
    publish_gain(run, roles.lm, config, outcome, facts, samples)
