"""What quantization costs a language model on WikiText-2, beside bitsandbytes.

    python benchmarks/lm_quality.py MODEL --text test.txt --calibration valid.txt [--device cuda] [--only gptq,KV]
        [--out lm_quality.md]

MODEL is a folder, a GGUF file or a Hub id. Perplexities of all rows are over the same windows; change is against the
reference's. Rows are kept in a JSON file beside the table; with ``--only`` the others stay as they were measured.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlquant.llm.calibration import calibration_windows
from rlquant.llm.data import read_text
from rlquant.llm.kv_cache import QuantizedCache
from rlquant.llm.load import DTYPES, load
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.llm.text import Windows, compare_windows, window_losses
from rlquant.quant import size_table, weight_bytes
from rlquant.runs import machine_info

PLANS = (
    ("int8", "rtn"),
    ("w8a8-dynamic", "smoothquant"),
    ("w8a8-dynamic", "smoothquant+gptq"),
    ("w8a8", "smoothquant"),
    ("nf4", "rtn"),
    ("nf4-dq", "rtn"),
    ("int4-g128", "rtn"),
    ("int4-g128", "mse"),
    ("int4-g128", "hqq"),
    ("int4-g128", "awq"),
    ("int4-g128", "gptq"),
    ("int4-g128", "awq+gptq"),
    ("int4-g64-dq", "awq+gptq"),
    ("int4-g32-asym-dq", "rtn"),
    ("int4-g32-asym-dq", "gptq"),
    ("int4-g32-asym-dq", "awq+gptq"),
    ("int3-g128", "gptq"),
    ("nf4-dq+embedding=int8", "rtn"),
)
CACHES = ("int8", "fp8_e4m3", "int4")


def bits_per_weight(model: torch.nn.Module) -> float:
    """Of the linear layers in the blocks, scales included."""
    rows = [row for row in size_table(model) if ".layers." in row.name and row.kind == "QuantLinear"]
    return (
        8 * sum(row.codes + row.scales + row.zero_points for row in rows) / sum(row.weights for row in rows)
    )


class Table:
    """Rows of results, printed as they come."""

    def __init__(self, reference: LanguageModel, windows: Windows, kept: Path) -> None:
        self.reference, self.windows, self.kept = reference, windows, kept
        document = json.loads(kept.read_text()) if kept.exists() else {}
        same = document.get("protocol") == self.protocol
        self.rows: dict[str, dict[str, Any]] = document["rows"] if same else {}
        self.base = 0.0

    @property
    def protocol(self) -> str:
        """What has to be the same for rows to stand in one table."""
        return f"{self.reference.sha256} in {self.reference.precision}: {self.windows.protocol}"

    def add(
        self, name: str, lm: LanguageModel, *, bits: float | None, seconds: float, cache: Any = None
    ) -> None:
        """Measure a model."""
        perplexity = math.exp(window_losses(lm, self.windows, cache=cache).mean())
        self.base = self.base or perplexity
        some = Windows(self.windows.tokens[:8], self.windows.stride)
        same = compare_windows(self.reference, lm, some, cache=cache)
        row = {
            "name": name,
            "perplexity": perplexity,
            "change": perplexity / self.base - 1,
            "kl": same.kl,
            "top1": same.top1,
            "bits": bits,
            "seconds": seconds,
        }
        self.rows[name] = row | {"date": datetime.date.today().isoformat()}
        self.kept.write_text(json.dumps({"protocol": self.protocol, "rows": self.rows}, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def bitsandbytes_nf4(reference: LanguageModel, double: bool) -> LanguageModel:
    """Every linear layer in the blocks by bitsandbytes' own quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model = copy.deepcopy(reference.model)
    for block in model.model.layers:
        for parent in block.modules():
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    made = Linear4bit(
                        layer.in_features,
                        layer.out_features,
                        layer.bias is not None,
                        compute_dtype=layer.weight.dtype,
                    )
                    data = layer.weight.data.cpu()
                    made.weight = Params4bit(
                        data, requires_grad=False, quant_type="nf4", compress_statistics=double
                    )
                    made.bias = layer.bias
                    setattr(parent, name, made.to(reference.device))
    return reference.but(model=model, precision="bitsandbytes nf4")


def quantized(lm: LanguageModel, name: str, method: str, tokens: torch.Tensor) -> tuple[LanguageModel, float]:
    """A copy of the model, and the seconds that quantization took."""
    own = lm.but(model=copy.deepcopy(lm.model))
    start = time.perf_counter()
    made = quantize_model_(own, Plan.parse(name, method), calibration=tokens, batch=16)
    return made, time.perf_counter() - start


def main() -> None:
    """Measure all rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int)
    parser.add_argument("--only", help="parts of the names of rows, by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    reference = load(options.model, dtype=options.dtype, device=options.device)
    windows = Windows.of(reference.tokens(read_text(options.text)), options.window, limit=options.windows)
    tokens = calibration_windows(reference, options.calibration, windows=128, length=512)
    table = Table(reference, windows, options.out.with_suffix(".json"))
    table.add(options.dtype, reference, bits=None, seconds=0.0)
    jobs: list[tuple[str, Callable[[], None]]] = []
    for name, method in PLANS:
        jobs.append(
            (f"{name} {method}", lambda name=name, method=method: plan_row(table, name, method, tokens))
        )
    if options.device != "cpu":
        for double in (False, True):
            label = f"bitsandbytes nf4{'-dq' if double else ''}"
            jobs.append((label, lambda double=double, label=label: peer_row(table, label, double)))
    for scheme in CACHES:
        jobs.append((f"KV {scheme}", lambda scheme=scheme: cache_row(table, scheme)))
    for label, job in jobs:
        if options.only is None or any(part in label for part in options.only.split(",")):
            try:
                job()
            except Exception as error:  # one row that fails must not lose the others
                print(f"{label}: {error!r}", flush=True)
    write(table, options)


def plan_row(table: Table, name: str, method: str, tokens: torch.Tensor) -> None:
    """One of :data:`PLANS`."""
    made, seconds = quantized(table.reference, name, method, tokens)
    table.add(f"{name} {method}", made, bits=bits_per_weight(made.model), seconds=seconds)
    print(f"bytes {weight_bytes(made.model):,}", flush=True)


def peer_row(table: Table, label: str, double: bool) -> None:
    """bitsandbytes."""
    start = time.perf_counter()
    made = bitsandbytes_nf4(table.reference, double)
    table.add(label, made, bits=4 + (0.127 if double else 0.5), seconds=time.perf_counter() - start)


def cache_row(table: Table, scheme: str) -> None:
    """The float model, reading through a quantized KV cache."""
    lm = table.reference
    table.add(
        f"KV {scheme}", lm, bits=None, seconds=0.0, cache=lambda: QuantizedCache(lm.model.config, scheme)
    )


def write(table: Table, options: argparse.Namespace) -> None:
    """The table in Markdown."""
    lines = [
        "| precision, method | bits a weight | perplexity | change | KL | same token | seconds | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.rows.values():
        bits, kl, top1 = (
            "" if row[name] is None else f"{row[name] * factor:.{digits}f}{unit}"
            for name, factor, digits, unit in (("bits", 1, 2, ""), ("kl", 1, 4, ""), ("top1", 100, 1, "%"))
        )
        lines.append(
            f"| {row['name']} | {bits} | {row['perplexity']:.3f} | {100 * row['change']:+.2f}% | {kl} | {top1} | "
            f"{row['seconds']:.1f} | {row['date']} |"
        )
    machine = machine_info("cpu" if options.device == "cpu" else options.device)
    where = machine.get("gpu", machine["processor"])
    lines += [
        "",
        f"{table.reference.parameters:,} parameters in {options.dtype}; {options.text.name}: {table.windows.protocol}. "
        f"Calibrated on 128 windows of 512 tokens of {options.calibration.name}. "
        f"{where}.",
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
