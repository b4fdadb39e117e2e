"""What the commands ``evaluate`` and ``quantize`` do, once their options are parsed."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlquant.devices import device_named
from rlquant.errors import InputError
from rlquant.runs import RunFolder, machine_info, package_versions

if TYPE_CHECKING:
    from rlquant.control import Agent
    from rlquant.control.settings import RealTimeSettings

__all__ = [
    "EvaluateOptions",
    "default_folder",
    "folder_name",
    "progress_bar",
    "publish",
    "run_evaluate",
    "run_quantize",
]


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``rlquant evaluate``; see its help."""

    source: str
    reference: str | None
    env: str | None
    precisions: tuple[str, ...]
    methods: tuple[str, ...]
    episodes: int
    seed: int
    margin: float
    confidence: float
    sequential: bool
    max_episodes: int
    calibration_episodes: int
    closed_loop: int
    runtime: str
    realtime: bool
    slowdown: tuple[str, ...] | None
    latency: str | None
    control_rate: float | None
    device: str
    workers: int
    batch: int
    normaliser: Path | None
    frame_stack: int
    trust: bool
    out: Path | None


def run_evaluate(options: EvaluateOptions) -> None:
    """Evaluate, write results.json and report.html, print the table."""
    from rlquant.control import Evaluation, Settings
    from rlquant.control.evaluate import LATENCIES, subject
    from rlquant.control.settings import settings_json
    from rlquant.measure import results_document

    settings = Settings(
        precisions=options.precisions,
        methods=options.methods,
        episodes=options.episodes,
        seed=options.seed,
        margin=options.margin,
        confidence=options.confidence,
        calibration_episodes=options.calibration_episodes,
        closed_loop=options.closed_loop,
        sequential=options.sequential,
        max_episodes=options.max_episodes,
        device=device_named(options.device),
        runtime=options.runtime,
        realtime=_realtime(options),
    )
    settings.schemes()  # a misspelt precision is reported before anything is loaded
    for pair in settings.left_out():
        sys.stderr.write(f"rlquant: {pair}; left out\n")
    for name, count in (("--workers", options.workers), ("--batch", options.batch)):
        if count < 1:
            raise InputError(f"{name} must be at least 1, not {count}")
    agent = _load(options.source, options)
    artifact = agent if agent.precision != "fp32" else None
    if artifact is not None:
        agent = _reference_of(artifact, options)
    versions = package_versions()
    determined = {
        "subject": subject(agent),
        "artifact": artifact and artifact.sha256,
        "env": agent.env.to_json(),
        "observation": {key: part.to_json() for key, part in agent.parts.items()},
        "head": agent.head.to_json(),
        "settings": settings_json(settings),
        "versions": versions,
    }
    folder = RunFolder(options.out or default_folder(artifact or agent), determined)
    with progress_bar("episodes") as progress:
        evaluation = Evaluation(
            agent,
            settings,
            artifact=artifact,
            pieces=folder,
            workers=options.workers,
            batch=options.batch,
            progress=progress,
        )
        measured = evaluation.run()
    latencies = folder.piece(LATENCIES)
    if latencies is not None:
        folder.write("latencies.json", json.dumps(latencies))
    document = results_document(
        subject=subject(agent),
        settings=settings_json(settings),
        machine=machine_info(settings.device),
        versions=versions,
        reference=measured["reference"],
        rows=measured["rows"],
    )
    publish(folder, document)


def run_quantize(
    source: str,
    scheme_name: str,
    method: str,
    out: Path,
    env: str | None,
    seed: int,
    calibration_episodes: int,
    closed_loop: int,
    normaliser: Path | None,
    trust: bool,
) -> None:
    """Quantize an agent and write its artifact."""
    from rich.console import Console

    from rlquant.control import EnvPool, Quantizer, Settings, load, save_artifact
    from rlquant.control.methods import parse_method
    from rlquant.quant import MixedScheme, weight_bytes

    scheme = MixedScheme.parse(scheme_name)
    parse_method(method).check(scheme)
    # The same limits as in an evaluation.
    limits = Settings(seed=seed, calibration_episodes=calibration_episodes, closed_loop=closed_loop)
    agent = load(source, env=env, normaliser=normaliser, trust=trust)
    if agent.precision != "fp32":
        raise InputError(
            f"{source} is quantized to {agent.precision} already; quantize the agent it was made from"
        )
    pool = EnvPool(agent.env)
    quantizer = Quantizer(
        agent,
        pool,
        seed=limits.seed,
        calibration_episodes=limits.calibration_episodes,
        closed_loop=limits.closed_loop,
    )
    quantized = quantizer.quantize(scheme, method)
    pool.close()
    total = save_artifact(quantized, out)
    before, after = weight_bytes(agent.actor), weight_bytes(quantized.actor)
    Console().print(
        f"{out}: {scheme.name} by {method}, weights {before:,} -> {after:,} bytes ({before / after:.2f}x smaller), "
        f"{total:,} bytes on disk",
        highlight=False,
    )


def _load(source: str, options: EvaluateOptions) -> Agent:
    """Load an agent; say so where its environment has a new name."""
    from rlquant.control import load

    agent = load(
        source,
        env=options.env,
        normaliser=options.normaliser,
        frame_stack=options.frame_stack,
        trust=options.trust,
    )
    if agent.env.requested is not None:
        sys.stderr.write(f"rlquant: {agent.env.requested} has retired; evaluated on {agent.env.id}\n")
    return agent


def _reference_of(artifact: Agent, options: EvaluateOptions) -> Agent:
    """The fp32 agent that an artifact was made from, to compare it with."""
    source, sha256 = artifact.origin or ("", "")
    wanted = options.reference or source
    try:
        agent = _load(wanted, options)
    except InputError as error:
        raise InputError(
            f"{artifact.source} is compared with the agent that it was made from, {wanted!r}, which cannot be "
            f"loaded ({error}); name it with --reference"
        ) from None
    if agent.sha256 != sha256:
        raise InputError(
            f"{artifact.source} was made from another file than {wanted} (sha256 {sha256[:12]}..., not "
            f"{agent.sha256[:12]}...); name the right one with --reference"
        )
    return agent


def _realtime(options: EvaluateOptions) -> RealTimeSettings | None:
    """What the options say of real time; None without ``--realtime``."""
    given = {
        "--slowdown": options.slowdown,
        "--latency": options.latency,
        "--control-rate": options.control_rate,
    }
    if not options.realtime:
        alone = [option for option, value in given.items() if value is not None]
        if alone:
            raise InputError(f"add --realtime: without it, {' and '.join(alone)} would change nothing")
        return None
    from rlquant.control.realtime import read_latencies
    from rlquant.control.settings import RealTimeSettings

    try:
        slowdowns = tuple(map(float, options.slowdown or ("1",)))
    except ValueError:
        raise InputError(
            f"--slowdown {','.join(options.slowdown or ())!r} is no list of numbers such as 1,50,200"
        ) from None
    latencies = None if options.latency is None else read_latencies(options.latency)
    return RealTimeSettings(slowdowns, latencies, options.control_rate)


def publish(folder: RunFolder, document: dict[str, Any]) -> None:
    """Write the results and show them."""
    from rich.console import Console

    from rlquant.report import (
        gain_sentence,
        language_table,
        realtime_sentences,
        realtime_table,
        render_report,
        terminal_table,
        verdict_lines,
    )

    report = folder.write("report.html", render_report(document))
    folder.write("results.json", json.dumps(document, indent=1))  # last: its presence says that all is there
    console = Console(highlight=False)
    console.print(terminal_table(document, console.width))
    for line in (gain_sentence(document), *verdict_lines(document)):
        if line:
            console.print(line)
    of_text = language_table(document)
    if of_text is not None:
        console.print()
        console.print(of_text)
    in_real_time = realtime_table(document)
    if in_real_time is not None:
        console.print()
        console.print(in_real_time)
        for sentence in realtime_sentences(document):
            console.print(sentence)
    console.print(f"\n{folder.path / 'results.json'}\n{report}", style="dim", soft_wrap=True)


def default_folder(agent: Agent, *what: str) -> Path:
    """``runs/<what>-<agent>-<algorithm>``: the same command finds its folder again."""
    name = "-".join([*what, Path(agent.source).stem or "agent", agent.algorithm])
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name).lower()


def folder_name(source: str) -> str:
    """A name for the run folder of a language model."""
    return re.sub(r"[^\w.-]+", "-", Path(source).name or source).lower()


class progress_bar:
    """A progress bar on a terminal, silence elsewhere.

    Args:
        unit: what is counted.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def __enter__(self) -> Any:
        if not sys.stderr.isatty():
            return lambda _name, _done, _wanted: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description:>16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(self._unit),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._tasks: dict[str, Any] = {}
        return self._show

    def _show(self, name: str, done: int, wanted: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=wanted)
        self._bar.update(self._tasks[name], completed=done, total=wanted)

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_bar"):
            self._bar.stop()
