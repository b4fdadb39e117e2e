"""What the command ``tune`` does, once its options are parsed."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlquant.commands import default_folder, folder_name, publish
from rlquant.devices import device_named
from rlquant.errors import InputError
from rlquant.runs import RunFolder, machine_info, package_versions
from rlquant.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from rlquant.llm.evaluate import Texts
    from rlquant.llm.model import LanguageModel
    from rlquant.llm.settings import LanguageSettings
    from rlquant.llm.text import Windows
    from rlquant.llm.tune import TunedLanguage
    from rlquant.measure import Outcome

__all__ = ["LanguageTuneOptions", "TuneOptions", "run_tune", "run_tune_language"]


_LANGUAGE_RETAIN = 0.99


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


@dataclass(frozen=True)
class LanguageTuneOptions:
    """Options of ``rlquant tune`` for a language model; see its help. None takes the default."""

    source: str
    retain: float | None
    memory: str | None
    bits: float | None
    widths: tuple[int, ...] | None
    methods: tuple[str, ...]
    text: Path | None
    calibration: Path | None
    calibration_windows: int
    calibration_length: int
    window: int | None
    search_windows: int
    windows: int | None
    confidence: float
    seed: int
    dtype: str | None
    device: str
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
    _conclude(tuned, folder.path, "episodes")
    return 0 if tuned.held else 1


def run_tune_language(options: LanguageTuneOptions) -> int:
    """As :func:`run_tune`, of a language model."""
    from rlquant.llm.artifact import save_artifact
    from rlquant.llm.evaluate import subject
    from rlquant.llm.load import load
    from rlquant.llm.parts import BITS
    from rlquant.llm.settings import LanguageSettings
    from rlquant.llm.tune import tune_language
    from rlquant.measure import Goal, plain, results_document

    device = device_named(options.device)
    dtype = options.dtype or ("fp32" if device == "cpu" else "bf16")
    settings = LanguageSettings(
        precisions=(dtype,),
        methods=options.methods,
        window=options.window or LanguageSettings.window,
        windows=options.windows,
        calibration_windows=options.calibration_windows,
        calibration_length=options.calibration_length,
        confidence=options.confidence,
        seed=options.seed,
        device=device,
    )
    limit = parse_bytes(options.memory, "--memory") if options.memory else None
    goal = Goal(_LANGUAGE_RETAIN if options.retain is None else options.retain, limit)
    lm = load(options.source, dtype=dtype, device=device, trust=options.trust)
    if options.bits is not None:
        goal = replace(goal, memory=_smaller(limit, _bytes_at(options.bits, lm)))
    widths = options.widths or BITS
    texts, search, read = _language_texts(lm, settings, options)
    versions = package_versions()
    determined = {
        "subject": subject(lm),
        "goal": asdict(goal),
        "settings": {**settings.to_json(), **read, "widths": widths},
        "texts": [texts.sha256, hashlib.sha256(search.tokens.tobytes()).hexdigest()],
        "versions": versions,
    }
    folder = RunFolder(options.out or Path("runs") / f"tune-{folder_name(options.source)}", determined)
    tuned = tune_language(lm, goal, settings, texts, search, folder=folder, bits=widths, progress=_tell)
    save_artifact(tuned.lm, folder.path / "artifact", dtype=dtype)
    tuned.forget_blocks(folder)
    told = {**tuned.to_json(), "goal": asdict(goal), "again": _again(tuned, options, dtype)}
    folder.write("tune.json", json.dumps(plain(told), indent=1))
    publish(
        folder,
        results_document(
            subject=subject(lm),
            settings={**tuned.results["settings"], **read, "protocol": texts.windows.protocol},
            machine=machine_info(device),
            versions=versions,
            reference=tuned.results["reference"],
            rows=tuned.results["rows"],
        ),
    )
    _conclude(tuned, folder.path, "windows")
    return 0 if tuned.held else 1


def _smaller(*limits: int | None) -> int:
    return min(limit for limit in limits if limit is not None)


def _bytes_at(bits: float, lm: LanguageModel) -> int:
    if not bits > 0:
        raise InputError(f"--bits is what a weight may take on average, such as 4.5, not {bits}")
    return int(bits * lm.parameters / 8)


def _language_texts(
    lm: LanguageModel, settings: LanguageSettings, options: LanguageTuneOptions
) -> tuple[Texts, Windows, dict[str, str]]:
    """What proves and calibrates, what is searched with, and in words what that is."""
    from rlquant.llm.calibration import calibration_apart
    from rlquant.llm.data import read_text
    from rlquant.llm.evaluate import Texts
    from rlquant.llm.text import Windows
    from rlquant.llm.tune import split_windows

    if options.text is None:
        raise InputError(
            "a language model is tuned on text: give --text FILE, such as WikiText-2's test split"
        )
    ids, calibration, what = calibration_apart(
        lm,
        lm.tokens(read_text(options.text)),
        options.calibration,
        windows=settings.calibration_windows,
        length=settings.calibration_length,
        seed=settings.seed,
    )
    windows = Windows.of(ids, min(settings.window, lm.longest))
    search, proof = split_windows(
        windows, search=options.search_windows, proof=settings.windows, seed=settings.seed
    )
    read = {"text": options.text.name, "calibration": what, "search": search.protocol}
    return Texts(proof, calibration), search, read


def _again(tuned: TunedLanguage, options: LanguageTuneOptions, dtype: str) -> str:
    """The command that makes the same artifact, or that scores the same model where the text itself calibrated."""
    chosen = tuned.chosen
    calibration = [
        *("--calibration-windows", options.calibration_windows),
        *("--calibration-length", options.calibration_length),
        *("--seed", options.seed),
    ]
    if options.calibration is not None:
        verb = ["quantize", options.source, "--scheme", chosen.scheme, "--method", chosen.method]
        data = ["--calibration", options.calibration, "--dtype", dtype, "--out", "ARTIFACT"]
    else:
        verb = [
            "evaluate",
            options.source,
            "--precisions",
            f"{dtype},{chosen.scheme}",
            "--methods",
            chosen.method,
        ]
        data = ["--text", options.text]
    return shlex.join(map(str, ["rlquant", *verb, *data, *calibration]))


def _tell(sentence: str) -> None:
    """A line on a terminal, silence elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"{sentence}\n")


def _conclude(tuned: Outcome, folder: Path, unit: str) -> None:
    """The most sensitive tensors, the front and the outcome."""
    from rich.console import Console

    from rlquant.report import front_table, sensitivity_table

    console = Console(highlight=False)
    document: dict[str, Any] = tuned.to_json()
    console.print(sensitivity_table(document["sensitivity"]))
    console.print(front_table(document["front"], unit))
    for sentence in tuned.reasons:
        console.print(f"- {sentence}.", soft_wrap=True)
    console.print(f"\n{folder / 'artifact'}\n{folder / 'tune.json'}", style="dim", soft_wrap=True)
