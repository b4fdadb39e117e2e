"""What the command ``tune`` does, once its options are parsed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlquant.commands import default_folder, publish
from rlquant.errors import InputError
from rlquant.runs import RunFolder, machine_info, package_versions
from rlquant.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from rlquant.measure import Outcome

__all__ = ["TuneOptions", "run_tune"]


@dataclass(frozen=True)
class TuneOptions:
    """Options of ``rlquant tune``; see its help."""

    source: str
    env: str | None
    retain: float
    memory: str | None
    deadline: str | None
    methods: tuple[str, ...]
    episodes: int
    seed: int
    confidence: float
    max_episodes: int
    calibration_episodes: int
    normaliser: Path | None
    frame_stack: int
    trust: bool
    out: Path | None


def run_tune(options: TuneOptions) -> int:
    """Tune, write the artifact, tune.json, results.json and report.html; 0 where the goal holds, else 1."""
    from rlquant.control import Settings, load, save_artifact
    from rlquant.control.evaluate import subject
    from rlquant.control.settings import settings_json
    from rlquant.control.tune import tune
    from rlquant.measure import Goal, plain, results_document

    goal = Goal(
        options.retain,
        parse_bytes(options.memory, "--memory") if options.memory else None,
        parse_seconds(options.deadline, "--deadline") if options.deadline else None,
    )
    settings = Settings(
        precisions=(),
        methods=options.methods,
        episodes=options.episodes,
        seed=options.seed,
        margin=1 - goal.retain,
        confidence=options.confidence,
        calibration_episodes=options.calibration_episodes,
        sequential=True,
        max_episodes=options.max_episodes,
    )
    agent = load(
        options.source,
        env=options.env,
        normaliser=options.normaliser,
        frame_stack=options.frame_stack,
        trust=options.trust,
    )
    if agent.precision != "fp32":
        raise InputError(f"{options.source} is quantized to {agent.precision} already; tune the fp32 agent")
    versions = package_versions()
    determined = {
        "subject": subject(agent),
        "env": agent.env.to_json(),
        "goal": asdict(goal),
        "settings": settings_json(settings),
        "versions": versions,
    }
    folder = RunFolder(options.out or default_folder(agent, "tune"), determined)
    tuned = tune(agent, goal, settings, methods=options.methods, pieces=folder, progress=_tell)
    save_artifact(tuned.agent, folder.path / "artifact")
    folder.write("tune.json", json.dumps(plain(tuned.to_json()), indent=1))
    publish(
        folder,
        results_document(
            subject=subject(agent),
            settings=tuned.results["settings"],
            machine=machine_info(settings.device),
            versions=versions,
            reference=tuned.results["reference"],
            rows=tuned.results["rows"],
        ),
    )
    _conclude(tuned, folder.path)
    return 0 if tuned.held else 1


def _tell(sentence: str) -> None:
    """A line on a terminal, silence elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{sentence}\n")


def _conclude(tuned: Outcome, folder: Path) -> None:
    """The most sensitive tensors, the front and the outcome."""
    from rich.console import Console

    from rlquant.report import front_table, sensitivity_table

    console = Console(highlight=False)
    document: dict[str, Any] = tuned.to_json()
    console.print(sensitivity_table(document["sensitivity"]))
    console.print(front_table(document["front"]))
    for sentence in tuned.reasons:
        console.print(f"- {sentence}.", soft_wrap=True)
    console.print(f"\n{folder / 'artifact'}\n{folder / 'tune.json'}", style="dim", soft_wrap=True)
