"""The settings that recipes ship for cards of 4, 8 and 24 GB fit on such cards, by the planner."""

from __future__ import annotations

from typing import Any

import pytest

from rlquant import catalog
from rlquant.llm.architecture import read_architecture
from rlquant.llm.cards import find_card
from rlquant.llm.fitting import fits
from rlquant.llm.memory import Workload, plan_memory
from rlquant.llm.precision import Precision
from rlquant.running import find_recipe

CARDS = {"4gb": "RTX 3050 4GB", "8gb": "RTX 4060 8GB", "24gb": "L4 24GB"}
PLANNED = [name for name in catalog.recipe_configs() if "-qlora" in name and not name.startswith("rlhf")]


def workload(task: str, config: Any) -> Workload:
    """What the planner is told of a recipe's settings."""
    if task == "ppo":
        new = config.ppo.max_new_tokens
        batch = config.ppo.microbatch or config.ppo.minibatch
        return Workload(
            task=task,
            batch=batch,
            seq=config.data.max_prompt + new,
            completion=new,
            rank=config.adapters.rank,
        )
    common = {
        "rank": config.adapters.rank,
        "optimizer": "adamw" if config.train.optimizer == "adamw" else "adamw8bit",
        "checkpointing": config.train.checkpointing,
        "batch": config.train.batch,
    }
    if task == "grpo":
        return Workload(
            task=task, seq=config.data.max_prompt + config.new_tokens, completion=config.new_tokens, **common
        )
    return Workload(task=task, seq=config.data.max_length, **common)


@pytest.mark.parametrize("name", PLANNED)
def test_shipped_settings_fit_their_card(name: str) -> None:
    task, _, size = name.partition("-qlora")
    card = find_card(CARDS[size.strip("-") or "8gb"])
    _, config = find_recipe(name).config()
    model = read_architecture(config.model.source)
    plan = plan_memory(model, Precision.parse(config.model.precision), workload(task, config), card)
    assert fits(plan, card), f"{plan.peak / 2**20:,.0f} MiB of {card.usable / 2**20:,.0f}"
