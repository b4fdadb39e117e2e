"""What the recipes learn on a real model: preferences of GSM8K, and sums under a verifiable reward.

    python benchmarks/finetuning.py MODEL --gsm8k FOLDER [--rows dpo,ppo] [--parallel 4] [--out runs/finetuning]

MODEL is an instruct model, a folder or a Hub id. Each row is one ``rlquant run``; a repeated call goes on where one was
stopped, and writes the table of what is finished. The margins at the end are those that the recipes are held to.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from arithmetic import sums
from gsm8k import pairs, write_jsonl

HERE = Path(__file__).resolve().parent
PAIRS = ("data.chat=true", "data.max_length=768", "data.max_prompt=384", "data.held_out=0.15")
LEARN = ("train.batch=16", "train.accumulate=1", "train.lr=1e-4")
TWICE = "train.epochs=2"
PROMPTS = (
    "data={out}/sums.jsonl",
    "data.chat=true",
    "data.held_out=0.2",
    f"reward={HERE}/arithmetic.py:score",
)
MERGE = ("merge.precisions=[int4-g128, int4-g32-asym-dq]", "merge.methods=[gptq]")
PPO = ("ppo.steps=40", "ppo.batch=64", "ppo.minibatch=32", "ppo.microbatch=32", "ppo.epochs=2", "ppo.max_new_tokens=24",
       "ppo.learning_rate=1e-4", "ppo.critic_learning_rate=1e-4", "ppo.kl_coefficient=0.02",
       "ppo.rollouts=transformers")  # fmt: skip
GRPO = (
    "train.steps=80",
    "train.batch=64",
    "train.accumulate=1",
    "train.lr=1e-4",
    "new_tokens=24",
    "beta=0.02",
)
INT8 = ("rollouts=rlquant-int8", "kv_cache=int8", "importance_cap=2.0")
NF4, BF16 = "model.precision=nf4-dq", "model.precision=bf16"


def rows() -> dict[str, tuple[str, ...]]:
    """The recipe and the settings of every row."""
    written, model = ("data={out}/written.jsonl", *PAIRS), ("data={out}/model.jsonl", *PAIRS)
    return {
        "dpo": ("dpo-qlora", NF4, *written, *LEARN, TWICE, *MERGE),
        "dpo-bf16": ("dpo-qlora", BF16, *written, *LEARN, TWICE, "merge=null"),
        "dpo-model": ("dpo-qlora", NF4, *model, *LEARN, "merge=null"),
        "reward": ("reward-qlora", NF4, *written, *LEARN),
        "reward-model": ("reward-qlora", NF4, *model, *LEARN),
        "ppo": ("ppo-qlora", NF4, *PROMPTS, *PPO, *MERGE),
        "grpo": ("grpo-qlora", NF4, *PROMPTS, *GRPO, "rollouts=transformers", *MERGE),
        "grpo-engine": ("grpo-qlora", NF4, *PROMPTS, *GRPO, "rollouts=rlquant", "merge=null"),
        "grpo-int8": ("grpo-qlora", NF4, *PROMPTS, *GRPO, *INT8, "merge=null"),
    }


def run(name: str, model: str, out: Path) -> None:
    """One row, in a process of its own; what it says goes to a file."""
    recipe, *settings = rows()[name]
    given = [each.format(out=out) for each in settings]
    command = [
        sys.executable,
        "-m",
        "rlquant",
        "run",
        recipe,
        f"model={model}",
        *given,
        "--out",
        str(out / name),
    ]
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{name}: {'done' if status == 0 else f'exit status {status}, see {log.name}'}", flush=True)


def table(out: Path) -> str:
    """Of what is finished."""
    lines = [
        "| run | base | tuned | gain | 95% interval | merged, gptq: keeps of the gain | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in rows():
        try:
            document = json.loads((out / name / "results.json").read_text(encoding="utf-8"))
        except OSError:
            continue
        lines.append(_line(name, document))
    return "\n".join(lines)


def _line(name: str, document: dict[str, Any]) -> str:
    gain, merged = document["gain"], [row for row in document["rows"] if row["method"] == "gptq"]
    kept = ", ".join(f"{row['precision']} {row['retention']['value']:.0%}" for row in merged)
    low, high = gain["ci"]
    seconds = document["training"].get("seconds") or 0.0
    cells = [name, f"{gain['base']:.3f}", f"{gain['tuned']:.3f}", f"{gain['difference']:+.3f}",
             f"{low:+.3f} to {high:+.3f}", kept, f"{seconds / 60:.1f}"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run the rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--gsm8k", type=Path, required=True, help="with example_model_solutions.jsonl")
    parser.add_argument("--rows", default=",".join(rows()))
    parser.add_argument("--parallel", type=int, default=1, help="rows at a time on the same GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/finetuning"))
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "written.jsonl", pairs(options.gsm8k, "written"))
    write_jsonl(out / "model.jsonl", pairs(options.gsm8k, "model"))
    write_jsonl(out / "sums.jsonl", sums())
    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(lambda name: run(name, options.model, out), options.rows.split(",")))
    text = f"{table(out)}\n\n{datetime.date.today()}\n"
    (out / "finetuning.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
