"""Merge the adapter of a finished run into its model, quantize that, and measure what it keeps of the gain.

    rlquant run merge run=runs/dpo-qlora merge.precisions='[nf4-dq, int4-g128]' merge.methods='[rtn, gptq, awq]'
    rlquant run merge run=runs/dpo-qlora save=true merge.precisions='[int4-g128]' merge.methods='[gptq]'

The adapter is added to the float values of the weights that it was trained on, or with ``merge.onto=original`` to the
original ones, and these are quantized anew with the run's own data as calibration: a small change would not survive
being added to 4-bit codes. ``save`` writes each as an artifact, for ``rlquant evaluate``, ``bench`` and ``export``.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from rlquant import catalog
from rlquant.config import Section, checked
from rlquant.errors import InputError, unknown_name
from rlquant.gains import publish_gain
from rlquant.llm.adapters import load_adapter
from rlquant.llm.artifact import save_artifact
from rlquant.llm.backbone import Backbone, load_backbone, token_counter
from rlquant.llm.examples import Examples, read_examples
from rlquant.llm.finish import Scorer, compare_models, pair_scorer, reward_scorer, text_scorer
from rlquant.llm.merge import MergeSettings
from rlquant.llm.rewards import load_reward
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import with_prompt_text
from rlquant.llm.training import ADAPTER
from rlquant.runs import RunFolder

KINDS = {"dpo-qlora": "pairs", "sft-qlora": "texts", "ppo-qlora": "prompts", "grpo-qlora": "prompts"}


class Config(Section):
    """Settings of this recipe."""

    run: str = Field(description="the folder of a finished run")
    merge: MergeSettings = MergeSettings()
    save: bool = Field(False, description="write every merged model as an artifact")


def main(config: Config, run: RunFolder) -> None:
    """Merge, quantize, compare."""
    folder = Path(config.run).expanduser()
    recipe, of_run = _settings(folder)
    base = load_backbone(of_run.model)
    data = read_examples(of_run.data, KINDS[recipe], token_counter(base.lm))
    model = load_adapter(base.lm.model, ADAPTER, folder / "adapter")
    gain = json.loads((folder / "results.json").read_text(encoding="utf-8"))["gain"]

    def keep(name: str, lm: Any) -> None:
        if config.save and lm.method == "none":  # a float model, which transformers reads
            lm.model.save_pretrained(run.path / name)
            lm.tokenizer.save_pretrained(run.path / name)
        elif config.save:
            save_artifact(lm, run.path / name, dtype=of_run.model.computes_in)

    outcome = compare_models(
        run,
        base,
        model,
        of_run.model,
        scorer=_scorer(recipe, of_run, base, model, data),
        task=recipe.removesuffix("-qlora"),
        score=gain["score"],
        sample=gain["sample"],
        merge=config.merge,
        calibration=with_prompt_text(base.lm, data.train) if KINDS[recipe] == "prompts" else data.train,
        new_tokens=_new_tokens(recipe, of_run),
        keep=keep,
    )
    facts = {"base_sha256": None, "losses": []}
    publish_gain(run, base.lm, of_run, outcome, facts, "")


def _settings(folder: Path) -> tuple[str, Any]:
    """The recipe of a run and its settings."""
    try:
        written = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        recipe, tree = written["recipe"], written["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is no folder of a run: it holds no settings.json of a recipe") from None
    if recipe not in KINDS:
        raise unknown_name("recipe to merge the adapter of:", str(recipe), KINDS)
    if not (folder / "results.json").exists():
        raise InputError(f"the run in {folder} is not finished: repeat its command first")
    module = catalog.module_of(catalog.recipe_file(recipe), "recipes")
    return recipe, checked(module.Config, tree, str(folder / "settings.json"))


def _scorer(recipe: str, of_run: Any, base: Backbone, model: Any, data: Examples) -> Scorer:
    """What the run was scored by."""
    lm, longest = base.lm, of_run.data.max_length
    if KINDS[recipe] == "pairs":
        return pair_scorer(data.held_out, longest)
    if KINDS[recipe] == "texts":
        return text_scorer(data.held_out, longest)
    rows = with_prompt_text(lm, data.held_out)
    reward = load_reward(of_run.reward, lambda: Roles(lm.but(model=model)))
    return reward_scorer(rows, reward, new_tokens=_new_tokens(recipe, of_run), samples=of_run.samples)


def _new_tokens(recipe: str, of_run: Any) -> int:
    """Of a sampled answer; 0 where none is sampled."""
    if KINDS[recipe] != "prompts":
        return 0
    return int(of_run.ppo.max_new_tokens if recipe == "ppo-qlora" else of_run.new_tokens)
