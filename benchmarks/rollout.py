"""Rollouts beside transformers' generate, GRPO steps beside TRL's, and what fits on 4 GB.

    python benchmarks/rollout.py [--rows decode,memory] [--work runs/rollout] [--out benchmarks/rollout.md]

The exact Qwen2.5-0.5B architecture with random weights and a token for each byte, made here, in NF4 with double
quantization and LoRA r16 on all linear layers; prompts of 128 tokens, 256 new ones, sampled at temperature 1. A step is
a token of every sequence, the reading of the prompts included. Each row is a process of its own, one after another; a
repeated call runs only those that have no figures yet. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from finetuning_speed import GB4, MODEL, recipe
from gsm8k import write_jsonl
from memory import QUANTIZATION, make_model
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GenerationConfig, TrainerCallback, trainer

from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.architecture import built_in
from rlquant.llm.backbone import BaseSettings, load_backbone
from rlquant.llm.dense_policy import DensePolicy
from rlquant.llm.engine import Completion, Engine
from rlquant.llm.roles import Roles

PROMPT, NEW = 128, 256
BATCHES = (1, 8, 64)
MODES = ("nf4+lora", "merged", "int8")
GENERATED = 64
"""Tokens by which generate is timed: its steps cost the same from first to last."""
GRPO = {"8 x 128": (8, 128, 8), "64 x 256": (64, 256, 8)}
"""Answers of a step, their tokens, answers to a prompt."""
STEPS, SKIPPED = 6, 2


def policy(folder: Path) -> Roles:
    """With an adapter that does something."""
    lm = load_backbone(BaseSettings(source=str(folder / "model"), precision="nf4-dq")).lm
    roles = Roles(lm)
    roles.add("policy", AdapterSettings())
    roles.model.eval()
    torch.manual_seed(0)
    for name, each in roles.parameters("policy").items():
        if "lora_B" in name:
            each.data.normal_(0, 0.01)
    return roles


@contextmanager
def clock() -> Iterator[dict[str, float]]:
    """Seconds, and the most bytes in use."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, float] = {}
    start = time.perf_counter()
    yield found
    torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - start
    found["peak"] = torch.cuda.max_memory_allocated()


def decode(folder: Path) -> dict[str, Any]:
    """Milliseconds a step of generate, the engine, and the engine with dense weights."""
    roles = policy(folder)
    acting = (nullcontext, DensePolicy(roles.model).acting, DensePolicy(roles.model, "int8").acting)
    ways = dict(zip(MODES, acting, strict=True))
    found: dict[str, Any] = {}
    for batch in BATCHES:
        ids = torch.randint(10, 200, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).cuda()
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=GENERATED, min_new_tokens=GENERATED, pad_token_id=0
        )
        with torch.no_grad(), roles.acting("policy"):
            found[f"generate {batch}"] = _generated(roles, ids, config)
            for mode, way in ways.items():
                with way():
                    row, made = _rolled_out(roles, ids.tolist())
                found[f"{mode} {batch}"] = row | _mismatch(roles, ids[made.prompt].tolist(), made)
    return found


def _generated(roles: Roles, ids: torch.Tensor, config: GenerationConfig) -> dict[str, Any]:
    def generate() -> None:
        roles.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    generate()
    with clock() as taken:
        generate()
    return taken | {"steps": GENERATED}


def _rolled_out(roles: Roles, prompts: list[list[int]]) -> tuple[dict[str, Any], Completion]:
    before = torch.cuda.memory_allocated()
    engine = Engine(roles.model, slots=len(prompts), length=PROMPT + NEW)
    complete = lambda seed: list(engine.complete(prompts, max_new_tokens=NEW, seed=seed))  # noqa: E731
    complete(0)
    complete(1)  # graphs for reading prompts are made where a shape comes again
    with clock() as taken:
        made = complete(2)
    return taken | {"steps": NEW, "cache": engine.cache.nbytes, "before": before}, made[0]


def _mismatch(roles: Roles, prompt: list[int], made: Completion) -> dict[str, float]:
    """Of log-probabilities as they were sampled from those of the policy that learns."""
    ids = torch.tensor([prompt + made.ids], device="cuda")
    logits = roles.model(ids).logits[0, PROMPT - 1 : -1].float()
    exact = logits.log_softmax(-1).gather(1, ids[0, PROMPT:, None])[:, 0].cpu()
    off = (exact - torch.tensor(made.log_probs)).abs()
    return {"mismatch": float(off.mean()), "mismatch_max": float(off.max())}


def memory(folder: Path) -> dict[str, Any]:
    """32 sequences of 1,024 tokens in 4 GB."""
    torch.cuda.set_per_process_memory_fraction(GB4 / torch.cuda.get_device_properties(0).total_memory)
    roles = policy(folder)
    weights = torch.cuda.memory_allocated()
    prompts = torch.randint(10, 200, (32, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad(), roles.acting("policy"), clock() as taken:
        engine = Engine(roles.model, slots=32, length=1024)
        made = list(engine.complete(prompts, max_new_tokens=1024 - PROMPT))
    tokens = sum(len(each.ids) for each in made)
    return taken | {
        "weights": weights,
        "cache": engine.cache.nbytes,
        "slots": engine.cache.slots,
        "tokens": tokens,
    }


class Steps(TrainerCallback):
    """Seconds of the steps after the first ones, of any trainer."""

    times: list[float] = []  # noqa: RUF012 - one process, one row

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of transformers' callbacks."""
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def score(completions: list[str], **_: Any) -> list[float]:
    """Something to learn from."""
    return [float(len(set(each))) for each in completions]


def grpo(size: str, ours: bool) -> Callable[[Path], dict[str, Any]]:
    """Seconds of a GRPO step."""
    together, new, group = GRPO[size]

    def run(folder: Path) -> dict[str, Any]:
        trainer.DEFAULT_CALLBACKS.append(Steps)
        if ours:
            recipe(
                "grpo-qlora", f"grpo-{together}", "data=FOLDER/prompts.jsonl", "data.chat=false", "data.held_out=0.01",
                f"data.max_prompt={PROMPT}", f"answers={group}", f"new_tokens={new}", f"train.batch={together}",
                "train.accumulate=1", f"train.steps={STEPS}", "train.warmup=0", "samples=1", "merge=null",
                "beta=0",  # TRL's default, with no reference to compare
                f"reward={Path(__file__).resolve()}:reward",
            )(folder)  # fmt: skip
        else:
            _trl(folder, together, new, group)
        seconds = [after - before for before, after in zip(Steps.times, Steps.times[1:], strict=False)][
            SKIPPED - 1 :
        ]
        return {
            "seconds": sum(seconds) / len(seconds),
            "steps": len(seconds),
            "peak": torch.cuda.max_memory_allocated(),
        }

    return run


def reward(prompts: list[str], completions: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """:func:`score` for rlquant."""
    return score(completions)


def _trl(folder: Path, together: int, new: int, group: int) -> None:
    """GRPO by TRL's defaults: only the task, the sizes and the quantization are named."""
    import trl
    from datasets import load_dataset

    bits = BitsAndBytesConfig(**QUANTIZATION["nf4-dq"], bnb_4bit_compute_dtype=torch.bfloat16)
    trl.GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=score,
        args=trl.GRPOConfig(
            output_dir=str(folder / "trl"), model_init_kwargs={"dtype": "bfloat16", "quantization_config": bits},
            save_strategy="no", report_to="none", disable_tqdm=True, per_device_train_batch_size=together,
            num_generations=group, max_completion_length=new, max_steps=STEPS,
        ),
        train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()  # fmt: skip


def rows() -> dict[str, Callable[[Path], dict[str, Any]]]:
    """All processes, by name."""
    steps = {f"grpo {size} {by}": grpo(size, by == "rlquant") for size in GRPO for by in ("trl", "rlquant")}
    return {"decode": decode, "memory": memory, **steps}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Of what was measured."""
    lines: list[str] = []
    if "decode" in found:
        lines += _decode_table(found["decode"])
    if "memory" in found:
        each = found["memory"]
        over = (each["peak"] - each["weights"] - each["cache"]) / 2**20
        lines.append(
            f"4 GB cap: {each['slots']} sequences of 1,024 tokens at a time, peak {each['peak'] / 2**20:,.0f} MiB, of "
            f"which weights {each['weights'] / 2**20:,.0f}, cache {each['cache'] / 2**20:,.0f}, all else {over:,.0f}; "
            f"{each['tokens'] / each['seconds']:,.0f} tokens/s.\n"
        )
    lines += [
        "| GRPO step, answers x tokens | TRL, s | rlquant, s | ratio | peaks, MiB |",
        "|---|---|---|---|---|",
    ]
    for size in GRPO:
        both = [found.get(f"grpo {size} {by}") for by in ("trl", "rlquant")]
        if all(both):
            theirs, ours = both  # type: ignore[misc]
            lines.append(
                f"| {size} | {theirs['seconds']:.2f} | {ours['seconds']:.3f} "
                f"| {theirs['seconds'] / ours['seconds']:.1f}x "
                f"| {theirs['peak'] / 2**20:,.0f}, {ours['peak'] / 2**20:,.0f} |"
            )
    return "\n".join(lines) + "\n"


def _decode_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| batch | generate, ms/step | nf4+lora | ratio | merged | ratio to nf4+lora | int8 | mismatch, mean and max "
        "| in int8 | over weights and cache, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for batch in BATCHES:
        each = {mode: found[f"{mode} {batch}"] for mode in ("generate", *MODES)}
        took = {mode: 1e3 * row["seconds"] / row["steps"] for mode, row in each.items()}
        ours = each["nf4+lora"]
        over = (ours["peak"] - ours["before"] - ours["cache"]) / 2**20
        lines.append(
            f"| {batch} | {took['generate']:.1f} | {took['nf4+lora']:.2f} | {took['generate'] / took['nf4+lora']:.1f}x "
            f"| {took['merged']:.2f} | {took['nf4+lora'] / took['merged']:.2f}x | {took['int8']:.2f} "
            f"| {_both(ours)} | {_both(each['int8'])} | {over:,.0f} |"
        )
    return [*lines, ""]


def _both(row: dict[str, Any]) -> str:
    return f"{row['mismatch']:.4f}, {row['mismatch_max']:.3f}"


def main() -> None:
    """Run the rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(rows()))
    parser.add_argument("--work", type=Path, default=Path("runs/rollout"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/rollout.md"))
    parser.add_argument("--row", help="run this row in this process")
    options = parser.parse_args()
    work = options.work
    if options.row:
        figures = rows()[options.row](work)
        (work / f"{options.row}.json").write_text(json.dumps(figures), encoding="utf-8")
        return
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model" / "config.json").exists():
        torch.manual_seed(0)
        make_model(work / "model", built_in()[MODEL])
    write_jsonl(work / "prompts.jsonl", [{"prompt": f"{number:04} " * 25} for number in range(200)])
    for name in options.rows.split(","):
        if not (work / f"{name}.json").exists():
            with (work / f"{name}.log").open("w", encoding="utf-8") as log:
                command = [sys.executable, __file__, "--work", str(work), "--row", name]
                status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
            print(f"{name}: {'done' if status == 0 else f'exit status {status}, see {log.name}'}", flush=True)
    kept = {name: work / f"{name}.json" for name in rows()}
    text = table({name: json.loads(path.read_text()) for name, path in kept.items() if path.exists()})
    text += f"\n{torch.cuda.get_device_name()}, {datetime.date.today()}\n"
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
