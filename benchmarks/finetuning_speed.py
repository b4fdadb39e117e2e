"""Tokens a second and peak memory of the recipes beside TRL's defaults, what runs on 4 GB, and what moves at lr 1e-6.

    python benchmarks/finetuning_speed.py --gsm8k FOLDER [--rows dpo-rlquant,dpo-trl] [--work runs/finetuning-speed]

The exact Qwen2.5-0.5B architecture with random weights and a token for each byte, made here. Each row is a process of
its own: ``rlquant run`` as a user runs it, or TRL's trainer with TRL's defaults, on the same rows. Steps are timed by a
callback that both have, after the first ones, and tokens are those that the trainers count, padding left out. Memory is
what torch allocated at most during training, without the base's quantization and the evaluation. Rows run one after
another, and a repeated call runs only those that have no figures yet. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from arithmetic import sums
from gsm8k import pairs, write_jsonl
from memory import QUANTIZATION, make_model
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainerCallback, trainer

from rlquant.llm.architecture import built_in

HERE = Path(__file__).resolve().parent
MODEL = "Qwen/Qwen2.5-0.5B"
SKIPPED = 10
"""Steps before time is taken: kernels are compiled and memory is laid out in them."""
STEPS = 110
GB4 = 4 * 10**9


@dataclass(frozen=True)
class Row:
    """One process.

    Attributes:
        about: what it does, for the table.
        run: does it, in a folder with the model and the data.
        cap: bytes of the device that it may use; None for all.
    """

    about: str
    run: Callable[[Path], None]
    cap: int | None = None


def recipe(name: str, out: str, *settings: str) -> Callable[[Path], None]:
    """``rlquant run`` with the model at hand."""

    def run(folder: Path) -> None:
        from rlquant.cli import app

        given = [each.replace("FOLDER", str(folder)) for each in settings]
        where = ["--out", str(folder / out)]
        app(["run", name, f"model={folder / 'model'}", *given, *where], standalone_mode=False)

    return run


def trl_dpo(data: str, **settings: Any) -> Callable[[Path], None]:
    """DPO by TRL's defaults: only the task, the sizes and the quantization are named."""

    def run(folder: Path) -> None:
        import trl
        from datasets import load_dataset

        bits = BitsAndBytesConfig(**QUANTIZATION["nf4-dq"], bnb_4bit_compute_dtype=torch.bfloat16)
        trl.DPOTrainer(
            model=str(folder / "model"),
            args=trl.DPOConfig(
                output_dir=str(folder / "trl"),
                model_init_kwargs={"dtype": "bfloat16"},
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **settings,
            ),
            train_dataset=load_dataset("json", data_files=str(folder / data), split="train"),
            quantization_config=bits,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        ).train()

    return run


def rows() -> dict[str, Row]:
    """All processes, by name."""
    end = ("data.held_out=0.01", "merge=null")
    dpo = (*end, "train.accumulate=1", "data.max_prompt=511")
    short = (
        "data=FOLDER/short.jsonl",
        "data.max_length=128",
        "train.batch=1",
        "train.steps=1000",
        "train.lr=1e-6",
    )
    answers = ("samples=1", "data=FOLDER/prompts.jsonl", "data.chat=false", "data.max_prompt=64", *end)
    ppo = (
        *answers,
        "ppo.batch=8",
        "ppo.minibatch=8",
        "ppo.microbatch=8",
        "ppo.steps=2",
        "ppo.epochs=1",
        "ppo.max_new_tokens=256",
    )
    grpo = (
        *answers,
        "train.batch=8",
        "train.accumulate=1",
        "new_tokens=256",
        "train.steps=2",
        f"reward={HERE}/arithmetic.py:score",
    )
    sizes = ("data=FOLDER/pairs.jsonl", "data.max_length=512", f"train.steps={STEPS}", "train.batch=4")
    long = ("data=FOLDER/long.jsonl", "data.max_length=1024", "train.batch=2", "train.steps=4")
    reward = ("data=FOLDER/pairs.jsonl", "data.max_length=512", "train.steps=2", "data.held_out=0.01")
    return {
        "dpo-trl": Row(
            "DPO, 4 pairs of up to 512 tokens, TRL's defaults",
            trl_dpo("pairs.jsonl", per_device_train_batch_size=4, max_length=512, max_steps=STEPS),
        ),
        "dpo-rlquant": Row("the same by dpo-qlora", recipe("dpo-qlora", "dpo", *sizes, *dpo)),
        "reward": Row("reward-qlora, for the next rows", recipe("reward-qlora", "reward", *reward)),
        "dpo-4gb": Row("dpo-qlora, 2 pairs x 1,024 tokens", recipe("dpo-qlora", "dpo-4gb", *long, *dpo), GB4),
        "grpo-4gb": Row("grpo-qlora, 8 answers x 256 tokens", recipe("grpo-qlora", "grpo", *grpo), GB4),
        "ppo-4gb": Row(
            "ppo-qlora, 8 answers x 256 tokens, four roles",
            recipe("ppo-qlora", "ppo", *ppo, "reward=FOLDER/reward/reward"),
            GB4,
        ),
        "moved-rlquant": Row("dpo-qlora, 1,000 steps at lr 1e-6", recipe("dpo-qlora", "moved", *short, *dpo)),
        "moved-trl": Row(
            "DPO, 1,000 steps at lr 1e-6, TRL's defaults",
            trl_dpo("short.jsonl", per_device_train_batch_size=1, max_length=128, max_steps=1000, learning_rate=1e-6),
        ),
    }  # fmt: skip


class Clock(TrainerCallback):
    """Seconds and tokens after the first steps, the peak, and how many elements of lora_A moved; for any trainer."""

    found: dict[str, float] = {}  # noqa: RUF012 - one process, one row

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Of transformers' callbacks, as are the others."""
        self.before = {
            name: each.detach().clone().cpu() for name, each in model.named_parameters() if "lora_A" in name
        }
        torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Time."""
        torch.cuda.synchronize()
        if state.global_step == SKIPPED:
            self.started = time.perf_counter()
        elif state.global_step == STEPS:
            self.found["seconds"] = time.perf_counter() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Tokens so far."""
        if "num_tokens" in (logs or {}):
            self.found[f"tokens-{state.global_step}"] = float(logs["num_tokens"])

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Peak and adapters."""
        self.found["peak"] = torch.cuda.max_memory_allocated()
        now = {name: each.detach().cpu() for name, each in model.named_parameters() if name in self.before}
        moved = sum(int((now[name] != each).sum()) for name, each in self.before.items())
        self.found["moved"] = moved / sum(each.numel() for each in self.before.values())


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run one row in this process."""
    row = rows()[name]
    trainer.DEFAULT_CALLBACKS.append(Clock)
    if row.cap is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(row.cap / total)
    row.run(folder)
    found: dict[str, Any] = {"peak": torch.cuda.max_memory_allocated(), **Clock.found}
    first, last = found.pop(f"tokens-{SKIPPED}", None), found.pop(f"tokens-{STEPS}", None)
    if first and last and "seconds" in found:
        found["tokens_per_second"] = (last - first) / found["seconds"]
    found = {key: value for key, value in found.items() if not key.startswith("tokens-")}
    return {**found, "device": torch.cuda.get_device_name(), "date": str(datetime.date.today())}


def prepare(folder: Path, gsm8k: Path) -> None:
    """The model and the data."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "config.json").exists():
        torch.manual_seed(0)
        make_model(folder / "model", built_in()[MODEL])
    found = pairs(gsm8k)
    fitting = [
        row for row in found if max(len(row["prompt"] + row[key]) for key in ("chosen", "rejected")) < 500
    ]
    write_jsonl(folder / "pairs.jsonl", fitting)
    write_jsonl(folder / "prompts.jsonl", sums(14))
    cut = [
        {key: (text * 9)[: 511 if key == "prompt" else 512] for key, text in row.items()}
        for row in found[:400]
    ]
    write_jsonl(folder / "long.jsonl", cut)
    brief = [{key: text[-60:] for key, text in row.items()} for row in found[:2000]]
    write_jsonl(folder / "short.jsonl", [row for row in brief if row["chosen"] != row["rejected"]])


def table(found: dict[str, dict[str, Any]]) -> str:
    """Of what was measured."""
    lines = ["| run | tokens/s | peak, MiB | moved in lora_A | measured |", "|---|---|---|---|---|"]
    for name, row in rows().items():
        if name not in found:
            continue
        each = found[name]
        speed = f"{each['tokens_per_second']:,.0f}" if "tokens_per_second" in each else ""
        moved = f"{each['moved']:.2%}" if "moved" in each else ""
        cap = ", capped at 4 GB" if row.cap else ""
        cells = [
            row.about + cap,
            speed,
            f"{each['peak'] / 2**20:,.0f}",
            moved,
            f"{each['device']}, {each['date']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if {"dpo-trl", "dpo-rlquant"} <= found.keys():
        ours, theirs = found["dpo-rlquant"], found["dpo-trl"]
        lines += [
            "",
            f"DPO beside TRL: {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}x the tokens a second, "
            f"{ours['peak'] / theirs['peak']:.2f}x the memory.",
        ]
    if {"ppo-4gb", "grpo-4gb"} <= found.keys():
        lines += [
            "",
            f"PPO beside GRPO: {found['ppo-4gb']['peak'] / found['grpo-4gb']['peak']:.2f}x the memory.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", type=Path, required=True, help="with example_model_solutions.jsonl")
    parser.add_argument("--rows", default=",".join(rows()))
    parser.add_argument("--work", type=Path, default=Path("runs/finetuning-speed"))
    parser.add_argument("--row", help="run this row in this process")
    options = parser.parse_args()
    if options.row:
        figures = measure(options.row, options.work)
        (options.work / f"{options.row}.json").write_text(json.dumps(figures), encoding="utf-8")
        return
    prepare(options.work, options.gsm8k)
    for name in options.rows.split(","):
        if not (options.work / f"{name}.json").exists():
            given = ["--gsm8k", str(options.gsm8k), "--work", str(options.work), "--row", name]
            with (options.work / f"{name}.log").open("w", encoding="utf-8") as log:
                command = [sys.executable, __file__, *given]
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            print(f"{name}: {'done' if status == 0 else f'exit status {status}, see {log.name}'}", flush=True)
    kept = {name: options.work / f"{name}.json" for name in rows()}
    text = table({name: json.loads(path.read_text()) for name, path in kept.items() if path.exists()})
    (options.work / "finetuning_speed.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
