"""The command line. Each command parses its options and hands over; heavy imports happen inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rlquant import __version__
from rlquant.errors import InputError, unknown_name

__all__ = ["app", "main"]

app = typer.Typer(
    name="rlquant",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize trained policies and prove how much reward they keep.",
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A shipped agent (see 'rlquant ls agents'), an SB3 .zip, an rl-zoo agent folder, an artifact, a "
        "transformers model folder, a .gguf file or a Hub id.",
    ),
]
EnvOption = Annotated[str | None, typer.Option("--env", help="Environment id; needed for a bare SB3 .zip.")]
NormaliserOption = Annotated[
    Path | None, typer.Option("--normaliser", help="vecnormalize.pkl of a bare SB3 .zip.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust", help="Let SB3 unpickle the file. This runs whatever code it holds.")
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of episode 0; episode i has seed + i.")]
CalibrationOption = Annotated[
    int, typer.Option("--calibration-episodes", help="On-policy episodes that fix activation ranges.")
]
ClosedLoopOption = Annotated[
    int, typer.Option("--closed-loop", help="Rounds of playing quantized and calibrating again.")
]
_LM = "Language models"
TextOption = Annotated[
    Path | None, typer.Option("--text", help="What is read and scored.", rich_help_panel=_LM)
]
CalibrationFileOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="What methods look at: text, or JSONL of texts, chats or pairs.",
        rich_help_panel=_LM,
    ),
]
CalibrationWindowsOption = Annotated[
    int, typer.Option("--calibration-windows", help="Windows of it that are read.", rich_help_panel=_LM)
]
CalibrationLengthOption = Annotated[
    int, typer.Option("--calibration-length", help="Tokens of each.", rich_help_panel=_LM)
]
# Options that mean something for both kinds of policies, or for one.
_BOTH = {
    "context",
    "source",
    "precisions",
    "methods",
    "method",
    "retain",
    "memory",
    "scheme",
    "seed",
    "margin",
    "confidence",
    "device",
    "trust",
    "to",
    "out",
}
_LANGUAGE = {
    "text",
    "calibration",
    "preferences",
    "window",
    "stride",
    "windows",
    "kv_cache",
    "generate",
    "dtype",
    "bits",
    "widths",
    "search_windows",
}
_LANGUAGE |= {"calibration_windows", "calibration_length", "prompt_tokens", "new_tokens"}
# What Typer's parser raises; Typer names only a child of it.
_UsageError: Any = typer.BadParameter.__base__
KINDS = ("agents", "envs", "recipes", "schemes")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"rlquant {__version__}")
        raise typer.Exit


@app.command()
def evaluate(
    context: typer.Context,
    source: Source,
    env: EnvOption = None,
    precisions: Annotated[
        str, typer.Option("--precisions", help="Comma-separated schemes; see 'rlquant ls schemes'.")
    ] = "fp32,bf16,int8,w8a8,int4,w4a8",
    reference: Annotated[
        str | None, typer.Option("--reference", help="The fp32 agent that an artifact was made from.")
    ] = None,
    methods: Annotated[
        str, typer.Option("--method", "--methods", help="Comma-separated quantization methods.")
    ] = "rtn",
    episodes: Annotated[int, typer.Option("--episodes", help="Episodes per precision.")] = 100,
    seed: SeedOption = 0,
    margin: Annotated[float, typer.Option("--margin", help="Share of the reward that may be lost.")] = 0.02,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the intervals.")] = 0.95,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Run more episodes where a verdict is undecided.")
    ] = False,
    max_episodes: Annotated[int, typer.Option("--max-episodes", help="Where --sequential stops.")] = 2000,
    calibration_episodes: CalibrationOption = 8,
    closed_loop: ClosedLoopOption = 0,
    runtime: Annotated[
        str,
        typer.Option("--runtime", help="torch, native, onnx or reference; auto: the fastest right one."),
    ] = "auto",
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Play again while the world does not wait for actions.")
    ] = False,
    slowdown: Annotated[
        str | None,
        typer.Option("--slowdown", help="Factors on their latency, such as 1,50,200; 1 if not given."),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option("--latency", help="2ms, or an earlier latencies.json; measured if not given."),
    ] = None,
    control_rate: Annotated[
        float | None, typer.Option("--control-rate", help="Steps a second; the card's if not given.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")] = "cpu",
    workers: Annotated[int, typer.Option("--workers", help="Processes; scores do not depend on it.")] = 1,
    batch: Annotated[int, typer.Option("--batch", help="Episodes that step together, likewise.")] = 128,
    normaliser: NormaliserOption = None,
    frame_stack: Annotated[
        int, typer.Option("--frame-stack", help="Observations that a bare SB3 .zip sees at once.")
    ] = 1,
    trust: TrustOption = False,
    text: TextOption = None,
    calibration: CalibrationFileOption = None,
    calibration_windows: CalibrationWindowsOption = 128,
    calibration_length: CalibrationLengthOption = 512,
    preferences: Annotated[
        Path | None,
        typer.Option(
            "--preferences", help="Pairs whose chosen answers should be likelier.", rich_help_panel=_LM
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens that are read at once; 1024.", rich_help_panel=_LM)
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="From window to window; its length.", rich_help_panel=_LM)
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", help="The first so many; all of the text.", rich_help_panel=_LM)
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            help="All but the reference read through a cache of int8, int4 or fp8_e4m3.",
            rich_help_panel=_LM,
        ),
    ] = None,
    generate: Annotated[
        str | None,
        typer.Option("--generate", help="Batch sizes to time; 1,8,64 on a GPU.", rich_help_panel=_LM),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; runs/NAME if not given.")] = None,
) -> None:
    """Show how much reward a policy keeps at each precision: a table, results.json and report.html.

    Repeating an interrupted command finishes it.
    """
    from rlquant.commands import EvaluateOptions, run_evaluate
    from rlquant.sources import source_kind

    kind = source_kind(source)
    _refuse_unfit(context, kind, source)
    if kind == "language":
        from rlquant.languages import LanguageOptions, run_evaluate_language

        given = _given(context)
        run_evaluate_language(
            LanguageOptions(
                source=source,
                precisions=_names(precisions, "--precisions") if "precisions" in given else None,
                methods=_names(methods, "--methods"),
                text=text,
                calibration=calibration,
                calibration_windows=calibration_windows,
                calibration_length=calibration_length,
                preferences=preferences,
                window=window,
                stride=stride,
                windows=windows,
                kv_cache=kv_cache,
                generate=None if generate is None else _counts(generate, "--generate"),
                margin=margin if "margin" in given else None,
                confidence=confidence,
                seed=seed,
                device=device,
                trust=trust,
                out=out,
            )
        )
        return
    run_evaluate(
        EvaluateOptions(
            source=source,
            reference=reference,
            env=env,
            precisions=_names(precisions, "--precisions"),
            methods=_names(methods, "--methods"),
            episodes=episodes,
            seed=seed,
            margin=margin,
            confidence=confidence,
            sequential=sequential,
            max_episodes=max_episodes,
            calibration_episodes=calibration_episodes,
            closed_loop=closed_loop,
            runtime=runtime,
            realtime=realtime,
            slowdown=None if slowdown is None else _names(slowdown, "--slowdown"),
            latency=latency,
            control_rate=control_rate,
            device=device,
            workers=workers,
            batch=batch,
            normaliser=normaliser,
            frame_stack=frame_stack,
            trust=trust,
            out=out,
        )
    )


@app.command()
def quantize(
    context: typer.Context,
    source: Source,
    scheme: Annotated[str, typer.Option("--scheme", help="For example int8, w8a8 or w4a8-g32.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the artifact.")],
    method: Annotated[str, typer.Option("--method", help="Quantization method.")] = "rtn",
    env: EnvOption = None,
    seed: SeedOption = 0,
    calibration_episodes: CalibrationOption = 8,
    closed_loop: ClosedLoopOption = 0,
    normaliser: NormaliserOption = None,
    trust: TrustOption = False,
    calibration: CalibrationFileOption = None,
    calibration_windows: CalibrationWindowsOption = 128,
    calibration_length: CalibrationLengthOption = 512,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of what stays a float: bf16, fp16 or fp32.", rich_help_panel=_LM)
    ] = "bf16",
    device: Annotated[
        str, typer.Option("--device", help="Where blocks are quantized, one at a time.", rich_help_panel=_LM)
    ] = "cpu",
) -> None:
    """Write a quantized artifact: packed weights as safetensors and JSON, no pickle."""
    from rlquant.commands import run_quantize
    from rlquant.sources import source_kind

    kind = source_kind(source)
    _refuse_unfit(context, kind, source)
    if kind == "language":
        from rlquant.languages import LanguageQuantizeOptions, run_quantize_language

        run_quantize_language(
            LanguageQuantizeOptions(
                source=source,
                scheme=scheme,
                method=method,
                out=out,
                calibration=calibration,
                calibration_windows=calibration_windows,
                calibration_length=calibration_length,
                dtype=dtype,
                device=device,
                seed=seed,
                trust=trust,
            )
        )
        return
    run_quantize(source, scheme, method, out, env, seed, calibration_episodes, closed_loop, normaliser, trust)


@app.command()
def tune(
    context: typer.Context,
    source: Source,
    retain: Annotated[
        float, typer.Option("--retain", help="Share of the reward to keep; 0.99 of a language model's.")
    ] = 0.98,
    memory: Annotated[
        str | None, typer.Option("--memory", help="What weights, scales and biases may take, such as 32KB.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option("--deadline", help="What 99 of 100 actions may take here, such as 1ms.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--method",
            "--methods",
            help="Methods to search with; distill takes minutes. For a language model gptq.",
        ),
    ] = "auto,distill",
    env: EnvOption = None,
    episodes: Annotated[
        int, typer.Option("--episodes", help="Of a proof, before more where undecided.")
    ] = 100,
    seed: SeedOption = 0,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the proof.")] = 0.95,
    max_episodes: Annotated[
        int, typer.Option("--max-episodes", help="Where an undecided proof stops.")
    ] = 2000,
    calibration_episodes: CalibrationOption = 8,
    normaliser: NormaliserOption = None,
    frame_stack: Annotated[
        int, typer.Option("--frame-stack", help="Observations that a bare SB3 .zip sees at once.")
    ] = 1,
    trust: TrustOption = False,
    text: TextOption = None,
    calibration: CalibrationFileOption = None,
    calibration_windows: CalibrationWindowsOption = 128,
    calibration_length: CalibrationLengthOption = 512,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens that are read at once; 1024.", rich_help_panel=_LM)
    ] = None,
    search_windows: Annotated[
        int,
        typer.Option("--search-windows", help="To search with, drawn from the text.", rich_help_panel=_LM),
    ] = 32,
    windows: Annotated[
        int | None,
        typer.Option("--windows", help="To prove with; all others of the text.", rich_help_panel=_LM),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            help="What a weight may take on average, scales and all; as --memory.",
            rich_help_panel=_LM,
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            help="Bits that parts of blocks may have; 8,6,5,4,3,2. Other formats have 8,4,3,2.",
            rich_help_panel=_LM,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the reference; fp32, on a GPU bf16.", rich_help_panel=_LM),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda or cuda:N.", rich_help_panel=_LM)
    ] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; runs/tune-NAME if not given.")
    ] = None,
) -> None:
    """Find the cheapest scheme, per layer, that keeps the reward: artifact, Pareto front, reasons and proof.

    Of a language model the reward is its lead over uniform guessing, in nats a token. Exit status 1 where no
    scheme reaches the goal; the best found is written all the same. Repeating an interrupted command finishes it.
    """
    from rlquant.sources import source_kind
    from rlquant.tuning import LanguageTuneOptions, TuneOptions, run_tune, run_tune_language

    kind, given = source_kind(source), _given(context)
    _refuse_unfit(context, kind, source)
    if kind == "language":
        status = run_tune_language(
            LanguageTuneOptions(
                source=source,
                retain=retain if "retain" in given else None,
                memory=memory,
                bits=bits,
                widths=None if widths is None else _counts(widths, "--widths"),
                methods=_names(methods, "--methods") if "methods" in given else ("gptq",),
                text=text,
                calibration=calibration,
                calibration_windows=calibration_windows,
                calibration_length=calibration_length,
                window=window,
                search_windows=search_windows,
                windows=windows,
                confidence=confidence,
                seed=seed,
                dtype=dtype,
                device=device,
                trust=trust,
                out=out,
            )
        )
        raise typer.Exit(status)
    status = run_tune(
        TuneOptions(
            source=source,
            env=env,
            retain=retain,
            memory=memory,
            deadline=deadline,
            methods=_names(methods, "--methods"),
            episodes=episodes,
            seed=seed,
            confidence=confidence,
            max_episodes=max_episodes,
            calibration_episodes=calibration_episodes,
            normaliser=normaliser,
            frame_stack=frame_stack,
            trust=trust,
            out=out,
        )
    )
    raise typer.Exit(status)


@app.command()
def bench(
    context: typer.Context,
    source: Source,
    precisions: Annotated[str, typer.Option("--precisions", help="Comma-separated schemes.")] = "fp32,w8a8",
    runtimes: Annotated[
        str,
        typer.Option(
            "--runtimes", help="Comma-separated: sb3 (model.predict), torch, native, onnx, reference, cuda."
        ),
    ] = "sb3,torch,onnx,native",
    method: Annotated[str, typer.Option("--method", help="Quantization method.")] = "rtn",
    calls: Annotated[int, typer.Option("--calls", help="Timed actions of each.")] = 5000,
    pin: Annotated[
        bool, typer.Option("--pin/--no-pin", help="Keep to one core meanwhile, where the system can.")
    ] = True,
    env: EnvOption = None,
    seed: SeedOption = 0,
    normaliser: NormaliserOption = None,
    trust: TrustOption = False,
    generate: Annotated[
        str, typer.Option("--generate", help="Batch sizes to time.", rich_help_panel=_LM)
    ] = "1,8",
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Read before the first.", rich_help_panel=_LM)
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Generated and timed.", rich_help_panel=_LM)
    ] = 32,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda or cuda:N.", rich_help_panel=_LM)
    ] = "cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; runs/bench-NAME if not given.")
    ] = None,
) -> None:
    """Time one action in each runtime at each precision, in turns; of a language model, its generation.

    Percentiles, jitter, the first call, missed deadlines, memory that a call allocates, and what else the
    machine did meanwhile.
    """
    from rlquant.benching import BenchOptions, run_bench
    from rlquant.sources import source_kind

    kind = source_kind(source)
    _refuse_unfit(context, kind, source)
    if kind == "language":
        from rlquant.languages import LanguageBenchOptions, run_bench_language

        run_bench_language(
            LanguageBenchOptions(
                source=source,
                precisions=_names(precisions, "--precisions") if "precisions" in _given(context) else None,
                generate=_counts(generate, "--generate"),
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                device=device,
                seed=seed,
                trust=trust,
                out=out,
            )
        )
        return
    run_bench(
        BenchOptions(
            source=source,
            env=env,
            precisions=_names(precisions, "--precisions"),
            runtimes=_names(runtimes, "--runtimes"),
            method=method,
            calls=calls,
            seed=seed,
            normaliser=normaliser,
            trust=trust,
            pin=pin,
            out=out,
        )
    )


@app.command()
def export(
    context: typer.Context,
    source: Source,
    to: Annotated[
        str,
        typer.Option(
            "--to", help="c, onnx or program; for a language model gptq, autogptq, awq or compressed-tensors."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    env: EnvOption = None,
    normaliser: NormaliserOption = None,
    trust: TrustOption = False,
) -> None:
    """Write an agent or artifact as C99 with a test vector, as an ONNX graph, or as a program folder.

    The artifact of a language model is written as a checkpoint that transformers loads.
    """
    from rlquant.exporting import run_export, run_export_language
    from rlquant.sources import source_kind

    kind = source_kind(source)
    _refuse_unfit(context, kind, source)
    if kind == "language":
        run_export_language(source, to, out, trust)
        return
    run_export(source, to, out, env, normaliser, trust)


@app.command()
def memory(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder with a config.json, that file, or a Hub id."),
    ] = "Qwen/Qwen2.5-0.5B",
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="8GB, or a card such as 'RTX 4090' [default: common cards].")
    ] = None,
    task: Annotated[
        str, typer.Option("--task", help="infer, or QLoRA training: sft, dpo, reward, grpo, ppo.")
    ] = "infer",
    precisions: Annotated[
        str, typer.Option("--precisions", help="Comma-separated schemes; nf4-dq quantizes scales too.")
    ] = "bf16,int8,nf4,nf4-dq,int4-g128",
    embedding: Annotated[
        str | None, typer.Option("--embedding", help="Scheme of the embedding and the output layer.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of what is not quantized: bf16, fp16 or fp32.")
    ] = "bf16",
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence, prompt and completion.")] = 1024,
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once; pairs in dpo and reward.")] = 4,
    completion: Annotated[
        int | None, typer.Option("--completion", help="Tokens of --seq that are generated [default: half].")
    ] = None,
    kv: Annotated[str, typer.Option("--kv", help="Of the KV cache: bf16, int8, int4 or fp8_e4m3.")] = "bf16",
    rank: Annotated[int, typer.Option("--rank", help="Of the LoRA adapters.")] = 16,
    adapters: Annotated[str, typer.Option("--adapters", help="Their dtype: fp32 or bf16.")] = "fp32",
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw or adamw8bit.")] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Gradient checkpointing.")
    ] = True,
    full_logits: Annotated[
        bool, typer.Option("--full-logits", help="All logits at once, as a plain loss or perplexity does.")
    ] = False,
    padded: Annotated[
        bool, typer.Option("--padded", help="Sequences of a batch differ in length: a mask is needed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Plan the device memory of a language model from its config alone: what fits on which card."""
    from rlquant.planning import MemoryOptions, run_memory

    run_memory(
        MemoryOptions(
            model=model,
            gpu=gpu,
            task=task,
            precisions=_names(precisions, "--precisions"),
            embedding=embedding,
            dtype=dtype,
            seq=seq,
            batch=batch,
            completion=completion,
            kv=kv,
            rank=rank,
            adapters=adapters,
            optimizer=optimizer,
            checkpointing=checkpointing,
            full_logits=full_logits,
            padded=padded,
            json=as_json,
        )
    )


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe (see 'rlquant ls recipes'), or a .py or .yml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as train.lr=5e-6.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="Name or file of other settings.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; runs/RECIPE if not given.")] = None,
) -> int:
    """Run a recipe: fine-tuning on a 4-bit base, merging, training quantized. Repeat the command to go on."""
    from rlquant.running import run_recipe

    return run_recipe(recipe, config, overrides or [], out)


@app.command()
def validate(file: Annotated[Path, typer.Argument(help="A recipe's settings, or a results.json.")]) -> None:
    """Check a file without running anything."""
    from rlquant.running import validate as check

    check(file)


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe, agent or environment.")],
    folder: Annotated[Path, typer.Argument(help="Where to; made if missing.")],
) -> None:
    """Copy something that is shipped, to change it."""
    from rlquant.running import copy

    for path in copy(name, folder):
        typer.echo(path)


@app.command()
def ls(kind: Annotated[str, typer.Argument(help=", ".join(KINDS))] = "agents") -> None:
    """List shipped agents, environments, recipes or schemes."""
    if kind not in KINDS:
        raise unknown_name("list", kind, KINDS)
    from rlquant.listings import print_listing

    print_listing(kind)


@app.command()
def env() -> None:
    """Print versions and hardware, for a bug report."""
    from rlquant.listings import print_environment

    print_environment()


@app.command()
def formats(
    name: Annotated[str | None, typer.Argument(help="A number format, such as fp8_e4m3.")] = None,
    value: Annotated[float | None, typer.Option("--value", help="Show how this number is stored.")] = None,
) -> None:
    """Show number formats: bits, limits, smallest step, and how a value is stored in each."""
    from rlquant.listings import print_formats

    print_formats(name, value)


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit status 2."""
    try:
        status = app(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except InputError as error:
        sys.stderr.write(f"rlquant: error: {error}\n")
        sys.exit(2)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            command = error.ctx.command_path if error.ctx is not None else "rlquant"
            sys.stderr.write(f"rlquant: error: {error.format_message()} See: {command} --help\n")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("rlquant: stopped; repeat the command to go on\n")
        sys.exit(130)
    except BrokenPipeError:  # `rlquant ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _given(context: typer.Context) -> set[str]:
    """Names of the options that were given, not taken from their defaults."""
    return {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def _refuse_unfit(context: typer.Context, kind: str, source: str) -> None:
    """Options that mean nothing for this kind of policy. Raises InputError."""
    control = set(context.params) - _BOTH - _LANGUAGE
    language = _LANGUAGE if context.info_name == "evaluate" else _LANGUAGE | {"device"}
    unfit = sorted(_given(context) & (control if kind == "language" else language))
    if unfit:
        what = "a language model" if kind == "language" else "a control policy"
        options = ", ".join("--" + name.replace("_", "-") for name in unfit)
        raise InputError(f"{options} means nothing for {source}, which is {what}: leave it out")


def _counts(text: str, option: str) -> tuple[int, ...]:
    """Comma-separated whole numbers."""
    try:
        return tuple(int(part) for part in _names(text, option))
    except ValueError:
        raise InputError(f"{option} {text!r} is no list of whole numbers such as 1,8,64") from None


def _names(text: str, option: str) -> tuple[str, ...]:
    """Names of a comma-separated list."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise InputError(f"{option} names nothing; for example {option} fp32,int8,w8a8")
    return names


if __name__ == "__main__":
    main()
