"""What the commands ``evaluate`` and ``quantize`` do with a language model, once their options are parsed."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlquant.commands import folder_name, progress_bar, publish
from rlquant.devices import device_named
from rlquant.errors import InputError
from rlquant.runs import RunFolder, machine_info, package_versions

if TYPE_CHECKING:
    from rlquant.llm.evaluate import Texts
    from rlquant.llm.model import LanguageModel
    from rlquant.llm.settings import LanguageSettings

__all__ = [
    "LanguageBenchOptions",
    "LanguageOptions",
    "LanguageQuantizeOptions",
    "run_bench_language",
    "run_evaluate_language",
    "run_quantize_language",
]


@dataclass(frozen=True)
class LanguageOptions:
    """Options of ``rlquant evaluate`` for a language model; see its help. None takes the default."""

    source: str
    precisions: tuple[str, ...] | None
    methods: tuple[str, ...]
    text: Path | None
    calibration: Path | None
    calibration_windows: int
    calibration_length: int
    preferences: Path | None
    window: int | None
    stride: int | None
    windows: int | None
    kv_cache: str | None
    generate: tuple[int, ...] | None
    margin: float | None
    confidence: float
    seed: int
    device: str
    trust: bool
    out: Path | None


@dataclass(frozen=True)
class LanguageQuantizeOptions:
    """Options of ``rlquant quantize`` for a language model; see its help."""

    source: str
    scheme: str
    method: str
    out: Path
    calibration: Path | None
    calibration_windows: int
    calibration_length: int
    dtype: str
    device: str
    seed: int
    trust: bool


@dataclass(frozen=True)
class LanguageBenchOptions:
    """Options of ``rlquant bench`` for a language model; see its help."""

    source: str
    precisions: tuple[str, ...] | None
    generate: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    device: str
    seed: int
    trust: bool
    out: Path | None


def run_evaluate_language(options: LanguageOptions) -> None:
    """Evaluate, write results.json and report.html, print the table."""
    from rlquant.llm.evaluate import LanguageEvaluation, subject
    from rlquant.llm.load import load
    from rlquant.llm.settings import LanguageSettings
    from rlquant.measure import results_document

    device = device_named(options.device)
    chosen = {
        "precisions": options.precisions
        or (("fp32" if device == "cpu" else "bf16"), "int8", "nf4", "int4-g128"),
        "methods": options.methods,
        "window": options.window,
        "stride": options.stride,
        "windows": options.windows,
        "calibration_windows": options.calibration_windows,
        "calibration_length": options.calibration_length,
        "cache": options.kv_cache,
        "generate": options.generate or ((1,) if device == "cpu" else (1, 8, 64)),
        "margin": options.margin,
        "confidence": options.confidence,
        "seed": options.seed,
        "device": device,
    }
    settings = LanguageSettings(**{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    lm = load(options.source, dtype=settings.reference, device=device, trust=options.trust)
    texts, read = _texts(lm, settings, options)
    about = {**settings.to_json(), **read, "protocol": texts.windows.protocol}
    versions = package_versions()
    determined = {"subject": subject(lm), "settings": about, "texts": texts.sha256, "versions": versions}
    folder = RunFolder(options.out or Path("runs") / folder_name(options.source), determined)
    with progress_bar("windows") as progress:
        measured = LanguageEvaluation(lm, settings, texts, folder=folder, progress=progress).run()
    document = results_document(
        subject=subject(lm),
        settings=about,
        machine=machine_info(device),
        versions=versions,
        reference=measured["reference"],
        rows=measured["rows"],
    )
    publish(folder, document)


def run_quantize_language(options: LanguageQuantizeOptions) -> None:
    """Quantize a language model and write its artifact; a repeated command goes on after the last finished block."""
    from rich.console import Console

    from rlquant.llm.artifact import save_artifact
    from rlquant.llm.calibration import calibration_windows
    from rlquant.llm.evaluate import subject
    from rlquant.llm.load import load
    from rlquant.llm.quantize import Plan, quantize_model_
    from rlquant.quant import weight_bytes

    plan = Plan.parse(options.scheme, options.method)
    if plan.needs_calibration and options.calibration is None:
        raise InputError(
            f"{plan.method} at {plan.scheme.name} reads text before it quantizes: give --calibration FILE "
            "(text, or JSONL of text, chats or preference pairs)"
        )
    device = device_named(options.device)
    lm = load(options.source, dtype=options.dtype, trust=options.trust, lazy=True)
    tokens = None
    if plan.needs_calibration and options.calibration is not None:
        tokens = calibration_windows(
            lm,
            options.calibration,
            windows=options.calibration_windows,
            length=options.calibration_length,
            seed=options.seed,
        )
    settings = {
        "subject": subject(lm),
        "plan": [plan.name, plan.method, options.dtype],
        "calibration": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    before = weight_bytes(lm.model)
    work = RunFolder(options.out, settings)
    with progress_bar("blocks") as progress:
        quantized = quantize_model_(
            lm,
            plan,
            calibration=tokens,
            device=device,
            store=work,
            progress=lambda done, wanted: progress(plan.scheme.name, done, wanted),
        )
    total = save_artifact(quantized, options.out, dtype=options.dtype)
    work.forget()
    after = weight_bytes(quantized.model)
    Console().print(
        f"{options.out}: {plan.name} by {plan.method}, weights {before:,} -> {after:,} bytes "
        f"({before / after:.2f}x smaller), {total:,} bytes on disk",
        highlight=False,
    )


def run_bench_language(options: LanguageBenchOptions) -> None:
    """Time generation at each precision and batch size, write bench.json, print the table."""
    import numpy as np
    from rich.console import Console

    from rlquant.llm.evaluate import generation_json, subject
    from rlquant.llm.load import DTYPES, load
    from rlquant.llm.settings import LanguageSettings
    from rlquant.llm.speed import time_generation
    from rlquant.llm.versions import accelerate_, at_precision
    from rlquant.measure import plain
    from rlquant.quant import weight_bytes
    from rlquant.report import generation_table

    device = device_named(options.device)
    precisions = options.precisions or (("fp32" if device == "cpu" else "bf16"), "int8", "nf4")
    settings = LanguageSettings(
        precisions=precisions,
        generate=options.generate,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        device=device,
    )
    lm = load(options.source, dtype=settings.reference, device=device, trust=options.trust)
    prompt = np.random.default_rng(options.seed).integers(0, lm.vocabulary, settings.prompt_tokens).tolist()
    timings = []
    for precision, _ in settings.rows():
        model = at_precision(lm, precision)
        size = weight_bytes(model.model)
        runtime = accelerate_(model, settings.reference, precision)
        simulated = precision not in DTYPES and runtime == "torch"
        for batch in settings.generate:
            timed = time_generation(
                model, prompt, batch=batch, tokens=settings.new_tokens, simulated=simulated
            )
            entry = {"precision": precision, "runtime": runtime, "weights": size}
            timings.append({**entry, **generation_json(timed)})
    document = {
        "schema": "rlquant.bench/1",
        "subject": subject(lm),
        "machine": machine_info(device),
        "versions": package_versions(),
        "settings": settings.to_json(),
        "timings": plain(timings),
    }
    folder = RunFolder(
        options.out or Path("runs") / f"bench-{folder_name(options.source)}", {"bench": subject(lm)}
    )
    path = folder.write("bench.json", json.dumps(document, indent=1))
    console = Console(highlight=False)
    console.print(generation_table(document["timings"]))
    console.print(f"\n{path}", style="dim", soft_wrap=True)


def _texts(
    lm: LanguageModel, settings: LanguageSettings, options: LanguageOptions
) -> tuple[Texts, dict[str, str]]:
    """What is read, and in words what that is."""
    from rlquant.llm.calibration import calibration_apart
    from rlquant.llm.data import read_pairs, read_text
    from rlquant.llm.evaluate import Texts
    from rlquant.llm.settings import KV
    from rlquant.llm.text import Windows
    from rlquant.llm.versions import plan_of

    if options.text is None:
        raise InputError(
            "a language model is evaluated on text: give --text FILE, such as WikiText-2's test split"
        )
    ids = lm.tokens(read_text(options.text))
    read = {"text": options.text.name}
    calibration = None
    plans = [plan_of(name.partition(KV)[0], method) for name, method in settings.rows() if method != "none"]
    if any(plan.needs_calibration for plan in plans):
        ids, calibration, read["calibration"] = calibration_apart(
            lm,
            ids,
            options.calibration,
            windows=settings.calibration_windows,
            length=settings.calibration_length,
            seed=settings.seed,
        )
        if options.calibration is None:
            sys.stderr.write(
                f"rlquant: calibrated on {read['calibration']}; --calibration FILE takes other data\n"
            )
    length = min(settings.window, lm.longest)
    windows = Windows.of(ids, length, settings.stride, settings.windows)
    pairs = read_pairs(options.preferences) if options.preferences is not None else []
    if options.preferences is not None:
        read["preferences"] = options.preferences.name
    return Texts(windows, calibration, pairs), read
