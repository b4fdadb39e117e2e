"""GPTQ here and in GPTQModel: one model, the same calibration tokens, perplexities by one protocol.

    python benchmarks/lm_gptq_peer.py measure MODEL --text test.txt --calibration valid.txt --peer PYTHON --out DIR
        [--device cpu] [--dtype fp32] [--window 1024] [--windows 40] [--calibrate 128] [--only asym]

``measure`` writes the model and the tokens to DIR, quantizes here, and has GPTQModel quantize the same by
``lm_gptq_peer.py make`` in PYTHON, which needs nothing of rlquant; every checkpoint is then read here and scored. It
resumes, row by row. ``lm_gptq_peer.md`` is DIR's ``table.md``. PYTHON is made as ``checkpoints.md`` says.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the peer's Python has no rlquant
    from rlquant.llm.model import LanguageModel
    from rlquant.llm.text import Windows

DTYPES = ("fp32", "bf16", "fp16")
OURS = (
    ("int4-g128", "rtn"),
    ("int4-g128", "gptq"),
    ("int4-g128-asym", "rtn"),
    ("int4-g128-asym", "gptq"),
)
ASYMMETRIC = {"sym": False, "format": "gptq_v2"}
# GPTQModel's act_group_aware, its default, sorts columns within groups and groups by activation.
PEERS: dict[str, dict[str, Any]] = {
    "int4-g128 defaults": {},
    "int4-g128 desc_act": {"desc_act": True},
    "int4-g128 desc_act, static_groups": {"desc_act": True, "static_groups": True},
    "int4-g128 mse=2": {"mse": 2.0},
    "int4-g128-asym defaults": ASYMMETRIC,
    "int4-g128-asym desc_act": {**ASYMMETRIC, "desc_act": True},
    "int4-g128-asym mse=2": {**ASYMMETRIC, "mse": 2.0},
}


def make(model: str, tokens: str, out: str, settings: str, dtype: str, device: str) -> dict[str, Any]:
    """In the peer's Python: quantize a folder on int64 tokens ``[windows, length]`` and save it."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import numpy as np
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig, extension

    extension.load("pack_block_cpu")  # compiled at first use, which must not be timed
    if device != "cpu":
        from gptqmodel.quantization.gptq_cuda import block_update_available

        block_update_available()
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    config = QuantizeConfig(bits=4, group_size=128, offload_to_disk=False, **json.loads(settings))
    quantizer = GPTQModel.load(model, config, device=device, dtype=kind)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in np.load(tokens).tolist()]
    start = time.perf_counter()
    quantizer.quantize(rows, batch_size=16)
    seconds = time.perf_counter() - start
    quantizer.save(out)
    versions = {name: metadata.version(name) for name in ("gptqmodel", "torch", "transformers")}
    return {"seconds": seconds, "versions": versions}


def peer_made(options: argparse.Namespace, name: str, work: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """What GPTQModel made, as it is read here."""
    from rlquant.llm.load import load

    folder = work / name.replace(" ", "-").replace(",", "")
    arguments = (str(work / "model"), str(work / "tokens.npy"), str(folder), json.dumps(PEERS[name]))
    command = [options.peer, str(Path(__file__).resolve()), "make", *arguments, options.dtype, options.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return load(str(folder), dtype=options.dtype, device=options.device), json.loads(
        done.stdout.splitlines()[-1]
    )


def ours(lm: LanguageModel, scheme: str, method: str, tokens: Any) -> tuple[LanguageModel, dict[str, Any]]:
    """A copy of the model, quantized here."""
    from rlquant.llm.quantize import Plan, quantize_model_

    own = lm.but(model=copy.deepcopy(lm.model))
    start = time.perf_counter()
    made = quantize_model_(own, Plan.parse(scheme, method), calibration=tokens, batch=16)
    return made, {"seconds": time.perf_counter() - start}


def score(lm: LanguageModel, windows: Windows) -> dict[str, Any]:
    """Perplexity, and the losses of the windows that it is made of."""
    from rlquant.llm.text import window_losses

    losses = window_losses(lm, windows)
    return {"perplexity": math.exp(losses.mean()), "losses": losses.tolist()}


def measure(options: argparse.Namespace) -> None:
    """Every row that is asked for and not there yet, then the table of all that are there."""
    import numpy as np

    from rlquant.llm.calibration import calibration_windows
    from rlquant.llm.data import read_text
    from rlquant.llm.load import load
    from rlquant.llm.text import Windows
    from rlquant.runs import RunFolder, file_hash, write_atomic

    reference = load(options.model, dtype=options.dtype, device=options.device)
    windows = Windows.of(reference.tokens(read_text(options.text)), options.window, limit=options.windows)
    tokens = calibration_windows(reference, options.calibration, windows=options.calibrate, length=512)
    settings = {
        "model": reference.source,
        "dtype": options.dtype,
        "protocol": windows.protocol,
        "texts": [file_hash(options.text), file_hash(options.calibration), list(tokens.shape)],
        "device": options.device,
    }
    run = RunFolder(options.out, settings)
    np.save(run.path / "tokens.npy", tokens.numpy())
    if not (run.path / "model" / "config.json").exists():
        reference.tokenizer.save_pretrained(run.path / "model")
        reference.model.save_pretrained(run.path / "model")
    jobs: dict[str, Any] = {options.dtype: lambda: (reference, {"seconds": 0.0})}
    for scheme, method in OURS:
        jobs[f"{scheme} rlquant {method}"] = lambda s=scheme, m=method: ours(reference, s, m, tokens)
    for name in PEERS if options.peer else ():
        jobs[name.replace(" ", " GPTQModel ", 1)] = lambda n=name: peer_made(options, n, run.path.resolve())
    for name, job in jobs.items():
        if run.piece(name) is None and (
            name == options.dtype or options.only is None or options.only in name
        ):
            made, about = job()
            run.save_piece(name, {"name": name, **score(made, windows), **about})
            print(f"{name}: {(run.piece(name) or {})['perplexity']:.4f}", flush=True)
    rows = [row for name in jobs if (row := run.piece(name)) is not None]
    write_atomic(run.path / "table.md", table(rows, windows.protocol, options))


def _change(row: dict[str, Any], base: dict[str, Any]) -> str:
    """Of perplexity, with a 95% interval over the windows, which are paired."""
    import numpy as np

    apart = np.array(row["losses"]) - np.array(base["losses"])
    mean, spread = apart.mean(), 1.96 * apart.std(ddof=1) / len(apart) ** 0.5
    return f"{100 * math.expm1(mean):+.2f}% ± {100 * spread:.2f}"


def table(rows: list[dict[str, Any]], protocol: str, options: argparse.Namespace) -> str:
    """Markdown."""
    import datetime

    from rlquant.runs import machine_info

    named = {row["name"]: row for row in rows}
    timed = options.device != "cpu"  # a CPU is seldom idle, and nobody quantizes much there
    lines = [
        f"| quantized by | perplexity | to the float model | to rlquant gptq |{' seconds |' if timed else ''}",
        f"|---|---|---|---|{'---|' if timed else ''}",
    ]
    for row in rows:
        here = named.get(f"{row['name'].split()[0]} rlquant gptq")
        seconds = f" {row['seconds']:.1f} |" if timed else ""
        lines.append(
            f"| {row['name']} | {row['perplexity']:.3f} | {_change(row, rows[0])} | "
            f"{_change(row, here) if here else ''} |{seconds}"
        )
    versions: dict[str, str] = next((row["versions"] for row in rows if "versions" in row), {})
    peer = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = machine_info(options.device)
    command = (
        f"python benchmarks/lm_gptq_peer.py measure {Path(options.model).name} --text {options.text.name} "
        f"--calibration {options.calibration.name} --window {options.window} --windows {options.windows} "
        f"--calibrate {options.calibrate}"
    )
    lines += [
        "",
        f"`{command} --dtype {options.dtype} --device {options.device}`, {datetime.date.today().isoformat()}, "
        f"{where.get('gpu', where['processor'])}; {options.text.name}: {protocol}; {options.calibrate} windows of 512 "
        f"tokens of {options.calibration.name}. Intervals: 95% over the windows, paired. Peer: {peer}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """One of the two commands."""
    if sys.argv[1:2] == ["make"]:
        print("\n" + json.dumps(make(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("measure", "make"))
    parser.add_argument("model", help="a transformers folder, a GGUF file or a Hub id")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--peer", help="a Python with GPTQModel; its rows are left out without")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--calibrate", type=int, default=128, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--only", help="a part of the names of rows")
    parser.add_argument("--out", type=Path, required=True)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
