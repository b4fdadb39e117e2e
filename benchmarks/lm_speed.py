"""Bytes, quantization time and generation of the exact Qwen2.5-0.5B architecture, with random weights.

    python benchmarks/lm_speed.py [--parts bytes,gptq,generate,large] [--out benchmarks/lm_speed.md]

Needs a CUDA device. ``large`` quantizes a model of the shape of Qwen2.5-7B while this process may use 8 GB of the
device.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlquant.llm.bitsandbytes import to_bitsandbytes_
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.llm.speed import time_generation
from rlquant.quant import weight_bytes
from rlquant.runs import machine_info

SMALL = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
}
LARGE = {
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
}
CAP = 8 * 2**30


def made(sizes: dict[str, Any], device: str) -> LanguageModel:
    """A model with random weights of the usual scale, in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, dtype="bfloat16")).to(torch.bfloat16)
    return LanguageModel(model.eval(), None, "random", "bf16")


def allocated(make: Any) -> tuple[Any, int]:
    """What ``make`` makes, and the CUDA bytes that it holds."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    found = make()
    torch.cuda.synchronize()
    return found, torch.cuda.memory_allocated() - before


def bytes_part() -> list[str]:
    """What weights take, on the device and by the size table."""
    lines = ["| plan | MB on the device | MB by the size table |", "|---|---|---|"]
    for name in (
        "bf16",
        "nf4-dq",
        "nf4-dq+embedding=int8",
        "nf4-dq+embedding=nf4-dq",
        "int4-g128+embedding=int8",
    ):
        lm = made(SMALL, "cpu")
        if name != "bf16":
            lm = quantize_model_(lm, Plan.parse(name))
        size = weight_bytes(lm.model)
        _, held = allocated(lambda lm=lm: lm.model.to("cuda"))
        lines.append(f"| {name} | {held / 1e6:.1f} | {size / 1e6:.1f} |")
        print(lines[-1], flush=True)
    return lines


def gptq_part() -> list[str]:
    """GPTQ of all blocks on 128 windows of 2,048 tokens."""
    lm = made(SMALL, "cuda")
    tokens = torch.randint(0, 151_936, (128, 2048), generator=torch.Generator().manual_seed(0))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    quantize_model_(lm, Plan.parse("int4-g128", "gptq"), calibration=tokens, batch=8)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    return [f"GPTQ int4-g128, 24 blocks, 128 x 2,048 tokens: {seconds:.1f} s, peak {peak / 2**20:,.0f} MiB."]


def generate_part() -> list[str]:
    """Greedy generation after 128 tokens, by the model's own forward."""
    lines = [
        "| plan | runtime | batch | first token, ms | step, ms | tokens a second |",
        "|---|---|---|---|---|---|",
    ]
    plans = (("bf16", "torch"), ("nf4-dq+embedding=int8", "bitsandbytes"), ("int4-g128", "torch"))
    for name, runtime in plans:
        lm = made(SMALL, "cuda")
        if name != "bf16":
            lm = quantize_model_(lm, Plan.parse(name))
        if runtime == "bitsandbytes":
            to_bitsandbytes_(lm.model)
        for batch in (1, 8, 64):
            timed = time_generation(
                lm, list(range(128)), batch=batch, tokens=24, simulated=runtime == "torch"
            )
            lines.append(
                f"| {name} | {runtime} | {batch} | {timed.first_token_ms:.1f} | {timed.step.p50 / 1e3:.1f} | "
                f"{timed.tokens_per_second:,.0f} |"
            )
            print(lines[-1], flush=True)
    return lines


def large_part() -> list[str]:
    """A 7B-shaped model whose weights wait on the CPU, on a device of 8 GB."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(CAP / total)
    one = made({**LARGE, "num_hidden_layers": 1}, "cpu").model
    layers = [copy.deepcopy(one.model.layers[0]) for _ in range(LARGE["num_hidden_layers"])]
    one.model.layers = torch.nn.ModuleList(layers)
    one.config.num_hidden_layers = len(layers)
    one.config.layer_types = ["full_attention"] * len(layers)
    lm = LanguageModel(one, None, "random 7B", "bf16")
    tokens = torch.randint(0, 152_064, (32, 512), generator=torch.Generator().manual_seed(0))
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    quantize_model_(lm, Plan.parse("int4-g128", "gptq"), calibration=tokens, device="cuda", batch=4)
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    return [
        f"{lm.parameters / 1e9:.2f}B weights, GPTQ int4-g128, {len(layers)} blocks, 32 x 512 tokens, device capped at "
        f"8 GB: {seconds:.0f} s, peak {peak / 2**30:.2f} GiB."
    ]


def main() -> None:
    """Run the parts and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {"bytes": bytes_part, "gptq": gptq_part, "generate": generate_part, "large": large_part}
    parser.add_argument("--parts", default=",".join(parts))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    lines: list[str] = []
    for name in options.parts.split(","):
        try:
            lines += [*parts[name](), ""]
        except Exception as error:  # one part that fails must not lose the others
            lines += [f"{name}: {error!r}", ""]
        print(*lines[-4:], sep="\n", flush=True)
        torch.cuda.empty_cache()
    machine = machine_info("cuda")
    command = f"python benchmarks/lm_speed.py --parts {options.parts}"
    lines.append(f"`{command}`, {datetime.date.today().isoformat()}, {machine['gpu']}.")
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
