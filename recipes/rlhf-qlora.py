"""RLHF on a 4-bit base in one command: a reward model from preferences, then PPO (or GRPO) against it.

    rlquant run rlhf-qlora data=pairs.jsonl
    rlquant run rlhf-qlora data=pairs.jsonl by=grpo policy='{new_tokens: 256}'

Runs reward-qlora in the folder ``reward`` and ppo-qlora or grpo-qlora in the folder ``policy``; each resumes by itself.
``reward`` and ``policy`` hold settings of theirs. The policy learns on the prompts of the pairs, or on ``prompts``.
"""

import sys
from typing import Any, Literal

from pydantic import Field

from rlquant import catalog
from rlquant.config import Section, checked
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.backbone import BaseSettings
from rlquant.llm.examples import DataSettings
from rlquant.runs import RunFolder


class Config(Section):
    """Settings of this recipe."""

    model: BaseSettings = BaseSettings()
    data: DataSettings
    prompts: DataSettings | None = Field(
        None, description="what the policy learns on; null: the prompts of the pairs"
    )
    adapters: AdapterSettings = AdapterSettings()
    by: Literal["ppo", "grpo"] = "ppo"
    reward: dict[str, Any] = Field({}, description="more settings of reward-qlora")
    policy: dict[str, Any] = Field({}, description="more settings of ppo-qlora or grpo-qlora")


def main(config: Config, run: RunFolder) -> None:
    """Both stages, one after the other; all settings are checked first."""
    common = {"model": config.model.model_dump(), "adapters": config.adapters.model_dump()}
    prompts = (config.prompts or config.data).model_dump()
    learned = str(run.path / "reward" / "reward")
    stages = {
        "reward": ("reward-qlora", {**common, "data": config.data.model_dump(), **config.reward}),
        "policy": (f"{config.by}-qlora", {**common, "data": prompts, "reward": learned, **config.policy}),
    }
    ready = []
    for stage, (recipe, tree) in stages.items():
        module = catalog.module_of(catalog.recipe_file(recipe), "recipes")
        ready.append((stage, recipe, module, checked(module.Config, tree, f"{stage} of rlhf-qlora")))
    for stage, recipe, module, settings in ready:
        folder = RunFolder(run.path / stage, {"recipe": recipe, "config": settings.model_dump(mode="json")})
        if folder.piece("finished") is not None:
            continue
        sys.stderr.write(f"rlquant: {recipe} in {folder.path}\n")
        module.main(settings, folder)
        folder.save_piece("finished", {})
