"""Planned memory beside the peak that CUDA's allocator reports: transformers, bitsandbytes, PEFT and TRL.

    python benchmarks/memory.py [--rows dpo,infer] [--out benchmarks/memory.md]

The exact Qwen2.5-0.5B architecture with random weights, made here, so that nothing is downloaded. Each row loads the
model afresh, runs a few steps (or generates), and compares ``torch.cuda.max_memory_allocated`` with ``rlquant memory``.
A row that fails is reported and the rest goes on. Takes some minutes on one GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from rlquant.llm.architecture import architecture_of, built_in
from rlquant.llm.cards import Card
from rlquant.llm.memory import Workload, plan_memory
from rlquant.llm.precision import Precision
from rlquant.runs import machine_info, package_versions

MODEL = "Qwen/Qwen2.5-0.5B"
MiB = 2**20
STEPS = 3
QUANTIZATION = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    precision: str
    work: Workload
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """For the table."""
        work = self.work
        notes = [f"{self.dtype} embedding"] if self.dtype != "bf16" else []
        if work.trains:
            notes += [
                f"{work.adapters} adapters",
                "checkpointing" if work.checkpointing else "no checkpointing",
            ]
        if work.full_logits:
            notes.append("all logits")
        return f"{work.task} {work.batch} x {work.seq}, {', '.join([self.precision, *notes])}"


def rows() -> list[Row]:
    """What is measured."""
    dpo = {"task": "dpo", "batch": 4, "seq": 512}
    grpo = {"task": "grpo", "batch": 8, "seq": 256, "completion": 128}
    return [
        Row("bf16", Workload(batch=4, seq=1024, completion=32)),
        Row("int8", Workload(batch=4, seq=1024, completion=32)),
        Row("nf4", Workload(batch=4, seq=1024, completion=32)),
        Row("nf4-dq", Workload(batch=16, seq=2048, completion=32)),
        Row("bf16", Workload(batch=4, seq=1024, full_logits=True)),
        Row("nf4-dq", Workload(task="sft", batch=4, seq=1024, adapters="bf16")),
        Row("nf4-dq", Workload(task="sft", batch=4, seq=1024)),
        Row("nf4-dq", Workload(task="sft", batch=2, seq=1024, adapters="bf16", checkpointing=False)),
        Row("bf16", Workload(task="sft", batch=4, seq=512)),
        Row("nf4-dq", Workload(adapters="bf16", **dpo)),
        Row("nf4-dq", Workload(**dpo)),
        Row("nf4-dq", Workload(adapters="bf16", checkpointing=False, **dpo)),
        Row("nf4-dq", Workload(task="dpo", batch=2, seq=1024)),
        Row("nf4-dq", Workload(adapters="bf16", **grpo)),
        Row("nf4-dq", Workload(adapters="bf16", **grpo), dtype="fp32"),
        Row("nf4-dq", Workload(task="grpo", batch=8, seq=512, completion=128)),
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left"
    )


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """A model with random weights, and its tokenizer."""
    settings = dict(config)
    made = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=torch.bfloat16
    )
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def quantization(row: Row) -> BitsAndBytesConfig | None:
    """What bitsandbytes is asked for."""
    if row.precision not in QUANTIZATION:
        return None
    four = {"bnb_4bit_compute_dtype": torch.bfloat16} if row.precision != "int8" else {}
    return BitsAndBytesConfig(**QUANTIZATION[row.precision], **four)


def generation(row: Row, folder: Path, device: str) -> Callable[[], None]:
    """Greedy ``generate``, or a forward pass with a loss over all logits."""
    work = row.work
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization(row), device_map={"": device}
    ).eval()
    prompt = work.seq if work.full_logits else work.seq - work.generated
    ids = torch.randint(1, 200, (work.batch, prompt), device=device)

    @torch.no_grad()
    def run() -> None:
        if work.full_logits:
            model(ids, labels=ids)
            return
        new = work.generated
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    return run


def training(row: Row, folder: Path, device: str) -> Callable[[], None]:
    """TRL's trainer of the task, on sequences that all have the full length."""
    import trl
    from datasets import Dataset

    work, count = row.work, 64
    prompt = "a" * (work.seq - work.generated)
    long = ["b" * 2 * work.seq, "c" * 2 * work.seq]
    data: dict[str, list[str]] = {
        "sft": {"text": long[:1] * count},
        "dpo": {"prompt": ["a" * 16] * count, "chosen": long[:1] * count, "rejected": long[1:] * count},
        "grpo": {"prompt": [prompt] * count},
    }[work.task]
    common: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": work.checkpointing,
        "model_init_kwargs": {"dtype": {"bf16": "bfloat16", "fp32": "float32"}[row.dtype]},
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "learning_rate": 1e-6,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    named = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {"max_length": work.seq}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"max_length": work.seq}),
        "grpo": (
            trl.GRPOTrainer,
            trl.GRPOConfig,
            {"max_completion_length": work.generated, "num_generations": work.batch},
        ),
    }
    trainer_class, config_class, own = named[work.task]
    extra = {"reward_funcs": lambda completions, **_: [float(len(each)) for each in completions]}
    trainer = trainer_class(
        model=str(folder),
        args=config_class(**common, **own),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer(),
        quantization_config=quantization(row),
        peft_config=LoraConfig(
            r=work.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        ),
        **(extra if work.task == "grpo" else {}),
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[work.adapters]
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL has a dtype of its own for them
            parameter.data = parameter.data.to(dtype)
    return lambda: trainer.train()


def clean() -> None:
    """Give back what an earlier row holds, cuBLAS' workspaces too."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(row: Row, folder: Path) -> dict[str, Any]:
    """Bytes at the peak, what the allocator reserved, and what the device had in use beside that."""
    clean()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    run = (training if row.work.trains else generation)(row, folder, "cuda")
    clean()
    loaded = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "peak": torch.cuda.max_memory_allocated() - before,
        "left_before": before,
        "loaded": loaded - before,
        "reserved": torch.cuda.max_memory_reserved(),
        "context": total - free - reserved,
        "seconds": time.perf_counter() - started,
    }


def card() -> Card:
    """The device at hand."""
    properties = torch.cuda.get_device_properties(0)
    return Card(properties.name, properties.total_memory, properties.major)


def compare(row: Row, config: dict[str, Any], folder: Path, device: Card) -> dict[str, Any]:
    """A measurement beside its plan; an error instead of it where it fails."""
    plan = plan_memory(
        architecture_of(config, MODEL), Precision.parse(row.precision, dtype=row.dtype), row.work, device
    )
    found: dict[str, Any] = {
        "row": row.name,
        "precision": row.precision,
        "workload": asdict(row.work),
        "planned": {"peak": plan.peak, "stage": plan.stage, "parts": plan.parts, "stages": plan.stages},
    }
    try:
        found["measured"] = measure(row, folder)
    except Exception as error:  # the other rows are still worth measuring
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    print(line(found), flush=True)
    return found


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    planned = found["planned"]
    if "error" in found:
        return f"| {found['row']} | {planned['peak'] / MiB:,.0f} | failed: {found['error']} | | | |"
    measured = found["measured"]
    ratio = planned["peak"] / measured["peak"] - 1
    gaps = measured["reserved"] / measured["peak"] - 1
    return (
        f"| {found['row']} | {planned['peak'] / MiB:,.0f} | {measured['peak'] / MiB:,.0f} | {ratio:+.1%} | "
        f"{gaps:+.1%} | {measured['context'] / MiB:,.0f} |"
    )


def document(results: list[dict[str, Any]], command: str) -> str:
    """Markdown."""
    measured = [each for each in results if "measured" in each]
    worst = max(
        (abs(each["planned"]["peak"] / each["measured"]["peak"] - 1) for each in measured), default=0.0
    )
    head = (
        f"# Memory: plan and peak\n\n`{command}`, {datetime.date.today()}, {torch.cuda.get_device_name(0)}, exact "
        f"{MODEL} architecture with random weights, {STEPS} training steps. MiB; peak is "
        "`torch.cuda.max_memory_allocated`; gaps is what the allocator reserved beyond it; context is what the device "
        f"had in use beside the allocator. Largest deviation: {worst:.1%}.\n\n"
        "| what | planned | peak | deviation | gaps | context |\n|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(line(each) for each in results) + "\n"


def main() -> None:
    """Measure all rows and write the table and a JSON file beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="only those whose names contain one of these, by commas")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the peak of its allocator is what is measured")
    wanted = [each for each in options.rows.split(",") if each]
    chosen = [row for row in rows() if not wanted or any(each in row.name for each in wanted)]
    torch.zeros(1, device="cuda")
    config, device, results = built_in()[MODEL], card(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder, config)
        command = "python benchmarks/memory.py" + (f" --rows {options.rows}" if options.rows else "")
        for row in chosen:
            results.append(compare(row, config, folder, device))
            options.out.write_text(document(results, command), encoding="utf-8")
            numbers = {"machine": machine_info("cuda"), "versions": package_versions(), "rows": results}
            options.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
