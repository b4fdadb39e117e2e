"""Checkpoints that rlquant writes, read by other libraries, and the other way round: how far logits are apart.

For each format and scheme the model is quantized (round-to-nearest) and written; a peer in its own Python reads the
file, and logits of the same tokens are compared with those

- of the model that was written, in float32. GPTQ and AWQ round scales to float16;
- of the same file read here;
- of the same file read here and computed as there: dense weights and biases rounded to float16, as GPTQModel's
  kernels do; activations rounded as compressed-tensors does.

Where activations are quantized, the model is also compared with itself under noise of 3e-7 on every layer's input,
and both libraries with the float model.

Writes ``checkpoints.json`` and ``checkpoints.md``.

    python benchmarks/checkpoints.py MODEL --text FILE [--tokens 128] [--group 64] [--formats gptq,awq,...]

A peer whose Python is not given is left out:

- ``RLQUANT_TEST_GPTQMODEL_PYTHON``: torch, transformers, optimum, gptqmodel and compressed-tensors;
- ``RLQUANT_TEST_COMPRESSED_PYTHON``: torch, transformers and compressed-tensors 0.17.1, the last that loads its own
  asymmetric ``pack-quantized`` checkpoints: 0.18 to 0.20 expect their zero points unpacked and fail at the sizes;
- ``RLQUANT_TEST_AUTOGPTQ_PYTHON``: auto-gptq 0.7.1 with torch 2.2.2, transformers 4.38.2, numpy below 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints_activations import NOISE, counted, noisy, rounded_as_there
from numpy.typing import NDArray
from torch import nn

from rlquant.llm.checkpoints import write_checkpoint
from rlquant.llm.data import read_text
from rlquant.llm.load import load
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.quant import QuantLinear
from rlquant.runs import machine_info

HERE = Path(__file__).parent
PYTHONS = {
    "transformers": "RLQUANT_TEST_GPTQMODEL_PYTHON",
    "compressed-tensors": "RLQUANT_TEST_COMPRESSED_PYTHON",
    "gptqmodel": "RLQUANT_TEST_GPTQMODEL_PYTHON",
    "autogptq": "RLQUANT_TEST_AUTOGPTQ_PYTHON",
}
# Format, scheme, peer, dtype of the peer. GPTQModel's own loader takes 16 bits alone.
WRITTEN = (
    ("gptq", "int4-g{group}", "transformers", "fp32"),
    ("gptq", "int4-g{group}-asym", "transformers", "fp32"),
    ("gptq", "int8", "transformers", "fp32"),
    ("gptq", "int3-g{group}", "transformers", "fp32"),
    ("gptq", "int4-g{group}", "gptqmodel", "fp16"),
    ("autogptq", "int4-g{group}", "autogptq", "fp32"),
    ("autogptq", "int8", "autogptq", "fp32"),
    ("awq", "int4-g{group}-asym", "transformers", "fp32"),
    ("awq", "int4-g{group}", "transformers", "fp32"),
    ("compressed-tensors", "int4-g{group}", "transformers", "fp32"),
    ("compressed-tensors", "int4-g{group}-asym", "transformers", "fp32"),
    ("compressed-tensors", "int4-g{group}-asym", "compressed-tensors", "fp32"),
    ("compressed-tensors", "int8", "transformers", "fp32"),
    ("compressed-tensors", "w8a8", "transformers", "fp32"),
    ("compressed-tensors", "w8a8-dynamic", "transformers", "fp32"),
)
MADE: tuple[dict[str, Any], ...] = (
    {"bits": 4},
    {"bits": 4, "desc_act": True},
    {"bits": 4, "sym": False, "format": "gptq_v2"},
    {"bits": 8},
)

NOTES = """
The peers' Pythons (GPTQModel 7.7 asks for torch 2.14.1, and works on 2.13):

    pip install torch==2.13.0 transformers==5.23.0 accelerate compressed-tensors==0.20.0 datasets torchao \\
        defuser device-smi logbar pypcre threadpoolctl
    pip install --no-deps gptqmodel==7.7.0 tokenicer==0.0.14 optimum==2.3.0

    # Python 3.10
    pip install torch==2.2.2 "numpy<2" transformers==4.38.2 accelerate==0.28.0 peft==0.9.0 datasets sentencepiece \\
        rouge gekko
    pip install --no-deps auto-gptq==0.7.1

- GPTQModel's kernels round dense weights and biases to float16; done here, its logits are met. AutoGPTQ in fp32 rounds
  nothing. Its own `GPTQModel.load` takes 16 bits alone and computes in them.
- compressed-tensors 0.18.0, 0.19.0 and 0.20.0 make a meta module whose zero points are unpacked, so transformers loads
  no asymmetric `pack-quantized` checkpoint, one that 0.20.0 wrote included; 0.15.0.1 and 0.17.1 read ours exactly.
- w8a8: compressed-tensors' fake quantization adds the zero point before it rounds, `round(x / s + z)`; here, in torch's
  fake quantization and in vLLM's int8 kernels (by their source) it is `round(x * (1 / s)) + z`. In float32 the sum
  loses bits, so values near the middle between two codes take the other one; scales of w8a8-dynamic may also be off in
  the last place. That is all of the difference: computed as there, logits are met to the bit. What so few codes lead
  to is the model's doing: round-to-nearest w8a8 of SmolLM2 amplifies whatever it is given, and noise of a few units in
  the last place moves it as far from itself. Neither library is nearer to the float model.
- auto-gptq 0.7.1 loads a tied output layer only where it is in the file (else both are zero): `--to autogptq` writes
  it, `--to gptq` does not.
"""


@dataclass(frozen=True)
class Peer:
    """A library in its own Python."""

    name: str
    python: str

    def run(self, *arguments: str) -> dict[str, Any]:
        """Run ``checkpoints_peer.py`` and return its last line; its last error line where it fails."""
        command = [self.python, str(HERE / "checkpoints_peer.py"), *arguments]
        with tempfile.TemporaryDirectory() as work:  # GPTQModel leaves logs where it runs
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1]}
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def logits(
        self, folder: Path, dtype: str, ids: Path
    ) -> tuple[NDArray[np.float32] | None, dict[str, Any]]:
        """What it makes of a checkpoint, and what did it."""
        out = ids.with_name("peer.npy")
        reader = "transformers" if self.name == "compressed-tensors" else self.name
        told = self.run("read", reader, str(folder), dtype, str(ids), str(out))
        return (None if "error" in told else np.load(out)), told


def logits(lm: LanguageModel, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """``[tokens, vocabulary]``."""
    with torch.no_grad():
        found: NDArray[np.float32] = lm.model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    return found


def apart(ours: NDArray[np.float32], other: NDArray[np.float32]) -> dict[str, float]:
    """How far logits are apart, and at how many tokens the likeliest next one is the same."""
    same = ours.argmax(axis=-1) == other.argmax(axis=-1)
    return {"max_abs": float(np.abs(ours - other).max()), "top1_equal": float(same.mean())}


def half(lm: LanguageModel) -> LanguageModel:
    """Its quantized layers as dense ones, of weights and biases that were rounded to float16."""
    for name, layer in list(lm.model.named_modules()):
        if isinstance(layer, QuantLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.weight = nn.Parameter(layer.weight.half().float())
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias.half().float())
            lm.model.set_submodule(name, dense)
    return lm


def divergence(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Kullback-Leibler, of the likeliest next tokens from a reference's: mean in nats a token."""
    p, q = (torch.from_numpy(each).log_softmax(dim=-1) for each in (reference, other))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def beside_file(folder: Path, tokens: NDArray[np.int64], theirs: NDArray[np.float32]) -> dict[str, Any]:
    """The file as it is read here, in float32, beside what the peer made of it."""

    def here() -> LanguageModel:
        return load(str(folder), dtype="fp32")

    read = here()
    plain = logits(read, tokens)
    rows: dict[str, Any] = {"from the file": apart(plain, theirs)}
    if read.method != "compressed-tensors":
        rows["as there"] = apart(logits(half(read), tokens), theirs)
    elif any(layer.scheme.activations for layer in read.model.modules() if isinstance(layer, QuantLinear)):
        rows["as there"] = apart(logits(rounded_as_there(read), tokens), theirs)
        rows["noise"] = [apart(logits(noisy(here(), seed), tokens), plain) for seed in range(2)]
        rows["codes"] = counted(read := here())
        logits(read, tokens)
    return rows


def written_row(
    model: str, ids: Path, work: Path, form: str, scheme: str, peer: Peer, dtype: str
) -> dict[str, Any]:
    """A checkpoint of ours, read by a peer."""
    tokens = np.load(ids)
    plan = Plan.parse(scheme)
    seen = torch.from_numpy(tokens)[None] if plan.needs_calibration else None
    lm = quantize_model_(load(model, dtype="fp32"), plan, calibration=seen)
    folder = work / f"{form}-{scheme}-{peer.name}"
    size = write_checkpoint(lm, folder, form)
    theirs, told = peer.logits(folder, dtype, ids)
    row = {"format": form, "scheme": scheme, "reader": peer.name, "dtype": dtype, "bytes": size, **told}
    if theirs is not None:
        mine = logits(lm, tokens)
        row |= {"from the model": apart(mine, theirs), **beside_file(folder, tokens, theirs)}
        if "noise" in row:
            reference = logits(load(model, dtype="fp32"), tokens)
            row["from the float model"] = [divergence(reference, each) for each in (mine, theirs)]
    return row


def made_row(
    model: str, ids: Path, work: Path, settings: dict[str, Any], peer: Peer, texts: Path
) -> dict[str, Any]:
    """A checkpoint of GPTQModel's, read here and by transformers."""
    name = " ".join(f"{key}={value}" for key, value in settings.items())
    folder = work / name.replace(" ", "-")
    row: dict[str, Any] = {
        "format": "gptq, by GPTQModel",
        "scheme": name,
        "reader": "rlquant",
        "dtype": "fp32",
    }
    told = peer.run("make", model, str(folder), json.dumps(settings), str(texts))
    if "error" in told:
        return {**row, **told}
    theirs, told = peer.logits(folder, "fp32", ids)
    row |= told
    if theirs is not None:
        row |= beside_file(folder, np.load(ids), theirs)
    return row


def activations_table(rows: list[dict[str, Any]]) -> list[str]:
    """How much rounding matters where activations are quantized."""
    if not rows:
        return []
    lines = [
        "| scheme | codes that differ | top-1 equal, peer | computed as there | to itself under noise "
        "| KL from the float model, here | peer |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        differ, every = row["codes"]
        codes = f"{differ} of {every:,}" if every else "-"
        noise = " and ".join(f"{each['top1_equal']:.1%}" for each in row["noise"])
        near, far = row["from the float model"]
        lines.append(
            f"| {row['scheme']} | {codes} | {row['from the file']['top1_equal']:.1%} | "
            f"{row['as there']['top1_equal']:.1%} | {noise} | {near:.4f} | {far:.4f} |"
        )
    return [*lines, f"\nNoise: {NOISE:g} of a value, on the inputs of all quantized layers; two seeds."]


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"`{about['command']}`, {about['date']}; {about['model']}, {about['tokens']} tokens, logits up to "
        f"{about['largest']:.1f}; {about['machine']}.",
        "",
        "| format | scheme | read by | largest difference of a logit to the model written | to the file read here "
        "| to that computed as there | top-1 equal |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reader = f"{row['reader']}, {row['dtype']}"
        if "error" in row:
            lines.append(f"| {row['format']} | {row['scheme']} | {reader} | {row['error']} | | | |")
            continue
        rows_apart = [row.get(what) for what in ("from the model", "from the file", "as there")]
        figures = " | ".join("-" if each is None else f"{each['max_abs']:.1e}" for each in rows_apart)
        top = next(each["top1_equal"] for each in rows_apart if each is not None)
        lines.append(f"| {row['format']} | {row['scheme']} | {reader} | {figures} | {top:.1%} |")
    lines += ["", *activations_table([row for row in rows if "noise" in row])]
    versions: dict[str, dict[str, str]] = {}
    for row in rows:
        reader = "GPTQModel, as a maker" if row["reader"] == "rlquant" else row["reader"]
        versions.setdefault(reader, row.get("versions", {}))
    lines.append("")
    lines += [
        f"{reader}: {', '.join(f'{name} {version}' for name, version in used.items())}.\n"
        for reader, used in versions.items()
        if used
    ]
    return "\n".join(lines) + NOTES


def main() -> None:
    """Every row, then the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a transformers folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--formats", default="gptq,autogptq,awq,compressed-tensors,made")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    formats = options.formats.split(",")
    peers = {name: Peer(name, os.environ[key]) for name, key in PYTHONS.items() if os.environ.get(key)}
    text = read_text(options.text)
    lm = load(options.model, dtype="fp32")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ids, texts = work / "ids.npy", work / "texts.json"
        np.save(ids, np.array(lm.tokens(text)[: options.tokens]))
        largest = float(np.abs(logits(lm, np.load(ids))).max())
        length = len(text) // 32
        texts.write_text(
            json.dumps([text[k * length : k * length + 1000] for k in range(32)]), encoding="utf-8"
        )
        for form, scheme, reader, dtype in WRITTEN:
            if form in formats and reader in peers:
                name = scheme.format(group=options.group)
                rows.append(written_row(options.model, ids, work, form, name, peers[reader], dtype))
                print(json.dumps(rows[-1]), flush=True)
        if "made" in formats and "transformers" in peers:
            for settings in MADE:
                grouped = {"group_size": options.group, **settings}
                rows.append(made_row(options.model, ids, work, grouped, peers["transformers"], texts))
                print(json.dumps(rows[-1]), flush=True)
    about = {
        "command": f"python benchmarks/checkpoints.py {Path(options.model).name} --text {options.text.name} "
        f"--group {options.group}",
        "date": datetime.date.today().isoformat(),
        "model": Path(options.model).name,
        "tokens": options.tokens,
        "largest": largest,
        "machine": machine_info()["processor"],
    }
    (options.out / "checkpoints.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    (options.out / "checkpoints.md").write_text(table(rows, about))


if __name__ == "__main__":
    main()
