"""The settings that recipes ship for cards of 4, 8 and 24 GB fit on such cards, by the planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rlquant import catalog
from rlquant.errors import InputError
from rlquant.llm.architecture import read_architecture
from rlquant.llm.backbone import BaseSettings
from rlquant.llm.cards import find_card
from rlquant.llm.fitting import Knob, fits, require_fit
from rlquant.llm.memory import Workload, plan_memory
from rlquant.llm.precision import Precision
from rlquant.llm.training import _KNOBS
from rlquant.running import find_recipe
from rlquant.runs import RunFolder

CARDS = {"4gb": "RTX 3050 4GB", "8gb": "RTX 4060 8GB", "24gb": "L4 24GB"}
PLANNED = [name for name in catalog.recipe_configs() if "-qlora" in name and not name.startswith("rlhf")]


@pytest.mark.parametrize("name", PLANNED)
def test_shipped_settings_fit_their_card(name: str) -> None:
    _, _, size = name.partition("-qlora")
    card = find_card(CARDS[size.strip("-") or "8gb"])
    _, config = find_recipe(name).config()
    model = read_architecture(config.model.source)
    plan = plan_memory(model, Precision.parse(config.model.precision), config.workload, card)
    assert fits(plan, card), f"{plan.peak / 2**20:,.0f} MiB of {card.usable / 2**20:,.0f}"


def test_a_rollout_of_many_completions_is_planned_for() -> None:
    """However few of them the backward pass takes together."""
    card = find_card("RTX 4060 8GB")
    _, config = find_recipe("ppo-qlora").config(["ppo.batch=4096", "ppo.microbatch=1"])
    model = read_architecture(config.model.source)
    plan = plan_memory(model, Precision.parse(config.model.precision), config.workload, card)
    assert plan.stage in ("prompt", "generation")
    with pytest.raises(InputError, match=r"this fits: ppo\.batch=\d+$"):
        require_fit(plan, card, {"batch": "ppo.microbatch=", "rollout": "ppo.batch="})


class Asked(Exception):
    pass


@pytest.mark.parametrize("name", ["sft-qlora", "dpo-qlora", "reward-qlora", "grpo-qlora", "ppo-qlora"])
def test_what_does_not_fit_is_told_in_the_recipes_own_settings(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What every recipe asks the planner before anything loads, answered for a card that is too small."""
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    module, config = find_recipe(name).config([f"data={data}"])

    def ask(base: BaseSettings, work: Workload, knobs: Mapping[Knob, str] = _KNOBS) -> None:
        card = find_card("3GB")
        model, precision = read_architecture(base.source), Precision.parse(base.precision)
        require_fit(plan_memory(model, precision, replace(work, batch=64, seq=2048), card), card, knobs)
        raise Asked

    monkeypatch.setattr(module, "require_memory", ask)
    with pytest.raises(
        InputError, match=r"needs .* GB, and .*; this fits: (train\.batch|ppo\.microbatch|data\.max)"
    ):
        module.main(config, RunFolder(tmp_path / "run", {}))
