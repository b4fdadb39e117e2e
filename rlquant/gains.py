"""What a fine-tuning recipe writes in the end: results.json, report.html and the card beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlquant.commands import publish
from rlquant.report import gain_sentence
from rlquant.runs import RunFolder, write_atomic

if TYPE_CHECKING:
    from rlquant.config import Section
    from rlquant.llm.model import LanguageModel
    from rlquant.llm.outcome import Outcome

__all__ = ["publish_gain"]


def publish_gain(
    run: RunFolder,
    lm: LanguageModel,
    config: Section,
    outcome: Outcome,
    facts: Mapping[str, Any],
    samples: str,
) -> None:
    """Write and show what was learned.

    Args:
        run: its folder, with the adapter in ``adapter``.
        lm: the base.
        config: the recipe's settings.
        outcome: the models compared.
        facts: of the training: ``losses``, ``base_sha256`` and the like.
        samples: answers to compare, as a Markdown table.
    """
    settings = {"config": config.model_dump(mode="json")}
    document = outcome.document(lm, settings, device=str(lm.device))
    document["training"] = dict(facts)
    learned = run.path / ("reward" if outcome.task == "reward" else "adapter")
    write_atomic(learned / "README.md", _card(document, samples))
    publish(run, document)


def _card(document: Mapping[str, Any], samples: str) -> str:
    """A model card in the form that the Hub reads."""
    config, training = document["settings"]["config"], document["training"]
    kept = [
        f"| {row['precision']} | {row['method']} | {row['score']['mean']:.3f} | {row['bytes']['weights'] / 1e6:.1f} |"
        for row in document["rows"]
    ]
    return "\n".join(
        [
            "---",
            f"base_model: {document['subject']['source']}",
            "library_name: peft",
            f"tags: [lora, {document['settings']['task']}, rlquant]",
            "---",
            "",
            f"# {document['settings']['task'].upper()} adapter on {document['subject']['source']}",
            "",
            gain_sentence(dict(document)),
            "",
            f"Trained on {config['data']['path']} on a frozen base in {config['model']['precision']}"
            + (
                f" (its SHA-256 before and after: {training['base_sha256']})"
                if training["base_sha256"]
                else ""
            )
            + ", adapters in float32.",
            "",
            "| weights | method | score | MB |",
            "|---|---|---|---|",
            *kept,
            "",
            "## Answers",
            "",
            samples,
        ]
    )
