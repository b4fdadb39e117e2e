"""Peak memory of `rlquant quantize` on a model that is larger than the memory allowed, beside its float size.

    python benchmarks/lm_large.py [Qwen/Qwen2.5-7B] [--plans int4-g128:rtn] [--limit 16GB] [--work /tmp]

The model has the sizes of a config.json (a name of ``rlquant.llm.architecture.built_in()``, or a file) and random
bfloat16 weights, which are written shard by shard and removed afterwards: 15.2 GB for the default. The command runs in
a process of its own, and what counts is the most memory that this process ever had resident (VmHWM of Linux), mapped
pages of files included. Exit status 1 where a peak is above the limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rlquant.llm.architecture import built_in
from rlquant.llm.quantize import Plan
from rlquant.runs import machine_info, package_versions
from rlquant.units import parse_bytes

SHARD = 2_000_000_000
# The command line as it is, and what the process says of itself at its end.
MEASURED = """
import json, sys, time
from pathlib import Path
import torch, transformers
import rlquant.llm.artifact
from rlquant import cli
from rlquant.llm.folders import empty_model

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

report, sys.argv = Path(sys.argv[1]), ["rlquant", *sys.argv[2:]]
empty_model(Path(sys.argv[2]), "bf16")  # imports what belongs to the architecture
before, start, status = memory("VmRSS"), time.perf_counter(), 0
try:
    cli.main()
except SystemExit as stopped:
    status = int(stopped.code or 0)
seconds = time.perf_counter() - start
report.write_text(json.dumps({"before": before, "peak": memory("VmHWM"), "seconds": seconds}))
sys.exit(status)
"""


def write_model(config: dict[str, Any], folder: Path) -> int:
    """A folder with random weights of these sizes, one shard in memory at a time; the bytes of its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    write_tokenizer(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(folder)), dtype=torch.bfloat16
        )
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def finish() -> None:
        name = f"model-{len(set(places.values())):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, parameter in model.named_parameters():
        if size >= SHARD:
            finish()
            size = 0
        shard[name] = random_weight(name, tuple(parameter.shape), generator)
        size += shard[name].nbytes
        total += shard[name].nbytes
    finish()
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """bfloat16: as a model is initialised, norms near one."""
    weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
    return weight + 1 if "norm" in name else weight


def write_tokenizer(folder: Path) -> None:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)


def measure(folder: Path, plan: str, options: argparse.Namespace) -> dict[str, Any]:
    """Quantize in a process of its own; its peak and time, and the bytes of the artifact."""
    scheme, _, method = plan.partition(":")
    method = method or "rtn"
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        text, report, out = Path(work) / "text.txt", Path(work) / "report.json", Path(work) / "out"
        text.write_text(random_text(options.windows * options.length))
        arguments = ["--scheme", scheme, "--method", method, "--out", out]
        if Plan.parse(scheme, method).needs_calibration:
            sizes = ("--calibration-windows", options.windows, "--calibration-length", options.length)
            arguments += ["--calibration", text, *sizes]
        command = [sys.executable, "-c", MEASURED, report, "quantize", folder, *arguments]
        subprocess.run([str(part) for part in command], check=True)
        disk = sum(file.stat().st_size for file in out.iterdir() if file.is_file())
        found: dict[str, Any] = json.loads(report.read_text())
    return {"plan": f"{scheme}, {method}", "disk": disk, **found}


def random_text(length: int) -> str:
    """Of printable characters."""
    codes = torch.randint(32, 127, (length,), generator=torch.Generator().manual_seed(1))
    return "".join(map(chr, codes.tolist()))


def table(rows: list[dict[str, Any]], floats: int, options: argparse.Namespace) -> str:
    """The figures in Markdown."""
    lines = [
        "| plan | float weights, GB | artifact, GB | peak resident, GB | of it imports, GB | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{each / 1e9:.2f}" for each in (floats, row["disk"], row["peak"], row["before"]))
        lines.append(f"| {row['plan']} | {sizes} | {row['seconds']:.0f} |")
    machine, versions = machine_info(), package_versions()
    layers = f" with {options.layers} layers" if options.layers else ""
    read = (
        f" Calibrated plans read {options.windows} x {options.length} tokens." if calibrated(options) else ""
    )
    note = (
        f"`python benchmarks/lm_large.py {options.config} --plans {options.plans}`, {datetime.date.today()}, "
        f"{machine['processor']}, threads: {torch.get_num_threads()}, torch {versions['torch']}: sizes of "
        f"{options.config}{layers}, random bfloat16 weights, `rlquant quantize` on the CPU.{read} Peak: VmHWM of the "
        "process, mapped pages of files included.\n"
    )
    return "\n".join([*lines, "", note])


def calibrated(options: argparse.Namespace) -> bool:
    """Whether any plan reads text."""
    return any(Plan.parse(*plan.split(":")).needs_calibration for plan in options.plans.split(","))


def main() -> int:
    """Measure all plans and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="Qwen/Qwen2.5-7B")
    parser.add_argument("--plans", default="int4-g128:rtn", help="SCHEME:METHOD, several by commas")
    parser.add_argument("--layers", type=int, help="fewer than the config says")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit", type=lambda text: parse_bytes(text, "--limit"), default=16_000_000_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--json", type=Path, help="the figures, for a program to read")
    options = parser.parse_args()
    known = built_in()
    config = (
        known[options.config] if options.config in known else json.loads(Path(options.config).read_text())
    )
    if options.layers:
        config = {**config, "num_hidden_layers": options.layers}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        start = time.perf_counter()
        floats = write_model(config, Path(work) / "model")
        print(f"{floats / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        rows = []
        for plan in options.plans.split(","):
            rows.append(measure(Path(work) / "model", plan, options))
            print(rows[-1], flush=True)
    options.out.write_text(table(rows, floats, options))
    if options.json is not None:
        options.json.write_text(json.dumps({"floats": floats, "rows": rows}))
    return int(any(row["peak"] > options.limit for row in rows))


if __name__ == "__main__":
    sys.exit(main())
