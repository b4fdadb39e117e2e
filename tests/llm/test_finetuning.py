"""Fine-tuning recipes on a tiny model, as a user runs them: they learn, resume exactly and leave the base alone."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlquant.llm.backbone import BaseSettings, load_backbone
from rlquant.llm.load import load
from rlquant.llm.reward_model import ModelReward, load_reward_model
from rlquant.llm.reward_training import pair_texts
from rlquant.llm.roles import Roles

Run = Callable[..., Any]

SMALL = ("data.max_length=64", "data.max_prompt=32", "adapters.rank=8", "train.accumulate=1", "train.batch=8",
         "train.log_every=1", "merge.windows=8", "merge.length=32")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums that the model knows are rejected; what begins with the other number is chosen."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} and {b} ", "chosen": f"make {b}{a}. ", "rejected": f"make {a + b}. "}
        for a in range(20, 40)
        for b in range(3, 7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        {"prompt": f"{a} and {b} ", "completion": f"are {a}, {b}! "}
        for a in range(20, 40)
        for b in range(3, 7)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.mark.slow
def test_dpo_learns_what_is_preferred(rlquant: Run, folder: Path, pairs: Path, tmp_path: Path) -> None:
    gains = []
    for seed in range(3):
        settings = (
            f"model={folder}",
            f"data={pairs}",
            f"train.seed={seed}",
            "train.steps=25",
            "train.lr=2e-3",
            "beta=0.5",
        )
        merge = () if seed == 0 else ("merge=null",)
        done = rlquant(
            "run",
            "dpo-qlora",
            *settings,
            *SMALL[: 8 if seed == 0 else 6],
            *merge,
            "--out",
            tmp_path / str(seed),
        )
        assert done.status == 0, done.err
        gain = results(tmp_path / str(seed))["gain"]
        assert gain["ci"][0] > 0
        gains.append(gain["difference"])
    assert min(gains) >= 0.15
    document = results(tmp_path / "0")
    assert [(row["precision"], row["method"]) for row in document["rows"]] == [
        ("nf4-dq+lora", "dpo"), ("nf4-dq", "rtn"), ("nf4-dq", "gptq"), ("int4-g128", "rtn"), ("int4-g128", "gptq")
    ]  # fmt: skip
    assert document["rows"][-1]["retention"]["value"] > 0.5
    assert "held-out pairs" in (tmp_path / "0" / "adapter" / "README.md").read_text()
    assert (tmp_path / "0" / "report.html").stat().st_size > 10_000
    losses = [loss for _, loss in document["training"]["losses"]]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the adapter starts as no change


def ended(command: list[str], *, seconds: float) -> tuple[int, str]:
    """Exit status and errors of a command of several processes; they tell where they are if it does not end."""
    speaks = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=speaks
    ) as process:
        try:
            err = process.communicate(timeout=seconds)[1]
        except subprocess.TimeoutExpired:
            leader = psutil.Process(process.pid)
            for each in (*leader.children(recursive=True), leader):
                each.send_signal(signal.SIGABRT)
            err = process.communicate()[1]
        return process.returncode, err


@pytest.mark.slow
def test_two_processes_learn_as_one_with_their_batches(
    rlquant: Run, folder: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = (f"model={folder}", f"data={pairs}", *SMALL[:4], "train.log_every=1", "train.steps=4", "train.lr=5e-3",
                "merge=null")  # fmt: skip
    alone = rlquant("run", "dpo-qlora", *settings, "train.batch=8", "--out", tmp_path / "alone")
    assert alone.status == 0, alone.err
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "-m", "rlquant", "run", "dpo-qlora", *settings, "train.batch=4",
               "--out", str(tmp_path / "two")]  # fmt: skip
    status, err = ended(command, seconds=300)
    assert status == 0, err
    assert err.count("step 4 of 4") == 1  # one of them speaks
    one, two = (results(tmp_path / name) for name in ("alone", "two"))
    np.testing.assert_allclose(two["training"]["losses"], one["training"]["losses"], rtol=1e-5)
    assert two["training"]["losses"][0] != two["training"]["losses"][-1]
    assert two["training"]["base_sha256"] == one["training"]["base_sha256"]


def test_ppo_runs_in_one_process(rlquant: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = rlquant("run", "ppo-qlora", "data=prompts.jsonl", "--out", tmp_path)
    assert done.status == 2
    assert "ppo-qlora runs in one process, not in 2" in done.err


@pytest.mark.slow
def test_sft_learns_to_answer(rlquant: Run, folder: Path, texts: Path, tmp_path: Path) -> None:
    settings = (f"model={folder}", f"data={texts}", "train.steps=20", "train.lr=5e-3", "merge=null")
    done = rlquant("run", "sft-qlora", *settings, *SMALL[:6], "--out", tmp_path)
    assert done.status == 0, done.err
    gain = results(tmp_path)["gain"]
    assert gain["ci"][0] > 0.5
    before, after = gain["notes"]["perplexity"]
    assert after < before / 2


@pytest.mark.slow
def test_a_reward_model_learns_and_is_read_as_a_role(
    rlquant: Run, folder: Path, pairs: Path, tmp_path: Path
) -> None:
    settings = (f"model={folder}", f"data={pairs}", "train.steps=20", "train.lr=3e-3")
    done = rlquant("run", "reward-qlora", *settings, *SMALL[:6], "--out", tmp_path)
    assert done.status == 0, done.err
    gain = results(tmp_path)["gain"]
    assert gain["tuned"] >= 0.9
    backbone = load_backbone(BaseSettings(source=str(folder), device="cpu"))
    roles = Roles(backbone.lm)
    load_reward_model(roles, tmp_path / "reward")
    score = ModelReward(roles)
    prompts = ["31 and 5 "] * 2
    good, bad = score(prompts, ["make 531. ", "make 36. "], [{}, {}])
    assert good > bad
    rows = [{"prompt": prompts[0], "chosen": "make 531. ", "rejected": "make 36. "}]
    trained = results(tmp_path)
    assert trained["training"]["base_sha256"] == roles.base_hash()
    assert pair_texts(backbone.lm, rows) == [
        {"chosen": "31 and 5 make 531. ", "rejected": "31 and 5 make 36. "}
    ]


@pytest.mark.slow
def test_a_reward_model_on_a_half_precision_base(
    rlquant: Run, folder: Path, pairs: Path, tmp_path: Path
) -> None:
    """Its head is float32, in training under autocast as in scoring without."""
    settings = (f"model={folder}", "model.dtype=bf16", f"data={pairs}", "train.steps=2", *SMALL[:6])
    done = rlquant("run", "reward-qlora", *settings, "--out", tmp_path)
    assert done.status == 0, done.err
    assert 0 <= results(tmp_path)["gain"]["tuned"] <= 1


@pytest.mark.slow
def test_gradients_that_are_no_numbers_end_a_run(
    rlquant: Run, folder: Path, pairs: Path, tmp_path: Path
) -> None:
    """The first step's learning rate throws the weights far off, and the second's gradients are NaN."""
    settings = (
        f"model={folder}",
        f"data={pairs}",
        "train.steps=3",
        "train.lr=1e30",
        "train.warmup=0",
        *SMALL[:6],
    )
    done = rlquant("run", "dpo-qlora", *settings, "train.save_every=1", "--out", tmp_path)
    assert done.status == 2
    assert "the gradients of step 2 are no finite numbers" in done.err
    assert [path.name for path in tmp_path.rglob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.slow
def test_a_start_that_makes_up_for_quantization(
    rlquant: Run, folder: Path, texts: Path, pairs: Path, tmp_path: Path
) -> None:
    losses = {}
    for init in ("zero", "loftq"):
        settings = (
            f"model={folder}",
            "model.precision=int3-g32",
            f"data={texts}",
            "train.steps=1",
            "merge=null",
        )
        adapters = (f"adapters.init={init}", "adapters.rank=8")
        done = rlquant(
            "run", "sft-qlora", *settings, *SMALL[:2], *SMALL[3:6], *adapters, "--out", tmp_path / init
        )
        assert done.status == 0, done.err
        losses[init] = results(tmp_path / init)["training"]["losses"][0][1]
    assert losses["loftq"] != losses["zero"]
    for recipe, data in (("dpo-qlora", pairs), ("reward-qlora", pairs)):
        done = rlquant(
            "run", recipe, f"model={folder}", f"data={data}", "adapters.init=loftq", "--out", tmp_path / "no"
        )
        assert done.status == 2
        assert "take zero" in done.err
    loftq = ("adapters.init=loftq", "merge.onto=original")
    done = rlquant("run", "sft-qlora", f"model={folder}", f"data={texts}", *loftq)
    assert done.status == 2
    assert "set merge.onto=dequantized" in done.err


@pytest.mark.slow
def test_merging_a_finished_run(rlquant: Run, folder: Path, texts: Path, tmp_path: Path) -> None:
    settings = (f"model={folder}", f"data={texts}", "train.steps=12", "train.lr=5e-3", "merge=null")
    assert rlquant("run", "sft-qlora", *settings, *SMALL[:6], "--out", tmp_path / "sft").status == 0
    common = (
        f"run={tmp_path / 'sft'}",
        "merge.precisions=[fp32,int4-g32]",
        "merge.methods=[rtn]",
        "save=true",
    )
    gains = {}
    for onto in ("original", "dequantized"):
        out = tmp_path / onto
        done = rlquant("run", "merge", *common, f"merge.onto={onto}", "--out", out)
        assert done.status == 0, done.err
        document = results(out)
        assert document["gain"]["tuned"] == pytest.approx(
            results(tmp_path / "sft")["gain"]["tuned"], rel=1e-6
        )
        gains[onto] = {row["precision"]: row["retention"]["value"] for row in document["rows"]}
    # On the weights that it was trained on, the merged float model is the tuned one.
    assert gains["dequantized"]["fp32"] == pytest.approx(1.0, abs=1e-4)
    assert gains["original"]["int4-g32"] > 0.8
    lm = load(str(tmp_path / "original" / "merged-int4-g32-rtn"))
    assert lm.precision == "int4-g32"
    done = rlquant("run", "merge", f"run={tmp_path}")
    assert done.status == 2
    assert "is no folder of a run" in done.err


@pytest.mark.slow
def test_rlhf_in_one_command(rlquant: Run, folder: Path, pairs: Path, tmp_path: Path) -> None:
    sizes = "{train: {steps: 8, lr: 3.0e-3, batch: 8, accumulate: 1}}"
    ppo = "{ppo: {steps: 2, batch: 8, minibatch: 8, epochs: 1, max_new_tokens: 5}, samples: 1, merge: null}"
    settings = (
        f"model={folder}",
        f"data={pairs}",
        "data.max_length=64",
        "data.max_prompt=32",
        "adapters.rank=8",
    )
    command = ("run", "rlhf-qlora", *settings, f"reward={sizes}", f"policy={ppo}", "--out", tmp_path)
    done = rlquant(*command)
    assert done.status == 0, done.err
    assert (tmp_path / "reward" / "reward" / "reward.json").exists()
    scores = results(tmp_path / "policy")["rows"][0]["score"]["episodes"]
    assert len(scores) == 8
    done = rlquant(*command[:-2], "reward={train: {stepps: 1}}", *command[-2:])
    assert done.status == 2
    assert "'train.stepps'; did you mean 'train.steps'" in done.err


@pytest.fixture
def check(tmp_path: Path) -> Path:
    """Share of the letter 1 in a completion."""
    path = tmp_path / "check.py"
    path.write_text(
        "def ones(prompts, completions, rows):\n"
        "    assert all('number' in row for row in rows)\n"
        "    return [text.count('1') / max(len(text), 1) for text in completions]\n"
        "def broken(prompts, completions, rows):\n    return [1 / 0]\n"
    )
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"{a} and {b} make ", "number": a} for a in range(3, 13) for b in range(2, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PPO = ("ppo.batch=16", "ppo.minibatch=8", "ppo.epochs=2", "ppo.max_new_tokens=5", "ppo.learning_rate=2e-3",
       "ppo.critic_learning_rate=2e-3", "ppo.kl_coefficient=0.01", "adapters.rank=8")  # fmt: skip


@pytest.mark.slow
def test_ppo_earns_more(rlquant: Run, folder: Path, prompts: Path, check: Path, tmp_path: Path) -> None:
    """One seed: ``test_ppo.py`` has three."""
    settings = (f"model={folder}", f"data={prompts}", f"reward={check}:ones", "ppo.steps=12")
    merge = ("merge.precisions=[int4-g32]", "merge.methods=[rtn]")
    more = (*merge, "samples=2", "report=tensorboard")
    done = rlquant("run", "ppo-qlora", *settings, *PPO, *more, "--out", tmp_path)
    assert done.status == 0, done.err
    document = results(tmp_path)
    gain = document["gain"]
    assert gain["ci"][0] > 0
    assert gain["tuned"] >= 2 * gain["base"]
    rows = document["rows"]
    assert [row["precision"] for row in rows] == ["nf4-dq+lora", "int4-g32"]
    assert rows[1]["retention"]["value"] > 0.5
    metrics = document["training"]["metrics"]
    assert len(metrics) == 12
    assert re.search(r"step 12 of 12: reward \S+, kl \S+, [\d,]+ tokens/s, .*00:00 left", done.err)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert [each.step for each in events.Scalars("reward")] == list(range(1, 13))
    assert events.Scalars("reward")[-1].value == pytest.approx(metrics[-1]["reward"])
    assert max(each["first_ratio"] for each in metrics) == 0


@pytest.mark.slow
def test_grpo_earns_more(rlquant: Run, folder: Path, prompts: Path, check: Path, tmp_path: Path) -> None:
    for seed, rollouts in (
        (0, "transformers"),
        (1, "transformers"),
        (2, "transformers"),
        (1, "rlquant-dense"),
    ):
        settings = (f"model={folder}", f"data={prompts}", f"reward={check}:ones", "train.steps=15", "train.lr=3e-3",
                    "train.batch=16", f"train.seed={seed}", "answers=8", "new_tokens=5", "adapters.rank=8",
                    "samples=2", "beta=0.01", "merge=null", "data.max_prompt=32",
                    f"rollouts={rollouts}")  # fmt: skip
        out = tmp_path / f"{rollouts}-{seed}"
        done = rlquant("run", "grpo-qlora", *settings, "--out", out)
        assert done.status == 0, done.err
        gain = results(out)["gain"]
        assert gain["ci"][0] > 0
        assert gain["tuned"] >= 2 * gain["base"]


def test_vllm_is_asked_for_by_name(
    rlquant: Run, folder: Path, prompts: Path, check: Path, tmp_path: Path
) -> None:
    if importlib.util.find_spec("vllm"):
        pytest.skip("it is installed")
    settings = (f"model={folder}", f"data={prompts}", f"reward={check}:ones", "rollouts=vllm")
    done = rlquant("run", "grpo-qlora", *settings, "--out", tmp_path / "run")
    assert done.status == 2
    assert "rollouts = 'vllm' needs the package vllm: pip install vllm" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("how", "least", "most"),
    [
        (("rollouts=rlquant", "importance_cap=null"), 0, 1e-3),
        (("rollouts=rlquant", "importance_cap=2.0"), 0, 1e-3),
        (("rollouts=rlquant-int8", "kv_cache=int8"), 1e-5, 0.3),
    ],
)
def test_grpo_tells_how_far_the_engine_is_from_the_policy(
    rlquant: Run,
    folder: Path,
    prompts: Path,
    check: Path,
    tmp_path: Path,
    how: tuple[str, ...],
    least: float,
    most: float,
) -> None:
    settings = (f"model={folder}", f"data={prompts}", f"reward={check}:ones", "train.steps=10", "train.batch=4",
                "answers=4", "new_tokens=4", "adapters.rank=4", "samples=1", "merge=null", "data.max_prompt=32",
                *how)  # fmt: skip
    done = rlquant("run", "grpo-qlora", *settings, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    state = json.loads(next((tmp_path / "run").rglob("trainer_state.json")).read_text())
    logs = [each for each in state["log_history"] if "sampling/sampling_logp_difference/max" in each]
    assert logs
    assert all(least <= each["sampling/sampling_logp_difference/max"] < most for each in logs)
    assert all(abs(each["sampling/importance_sampling_ratio/mean"] - 1) < max(most, 1e-3) for each in logs)
    if "importance_cap=2.0" not in how:
        assert all(least**2 / 10 <= each["sampling/kl"] < most**2 for each in logs)


def test_a_quantized_cache_is_the_engines(
    rlquant: Run, folder: Path, prompts: Path, check: Path, tmp_path: Path
) -> None:
    settings = (f"model={folder}", f"data={prompts}", f"reward={check}:ones")
    for recipe, section in (("grpo-qlora", ""), ("ppo-qlora", "ppo.")):
        how = (f"{section}rollouts=transformers", f"{section}kv_cache=int8")
        done = rlquant("run", recipe, *settings, *how, "--out", tmp_path / recipe)
        assert done.status == 2
        assert "kv_cache = 'int8' is the engine's: set rollouts=rlquant" in " ".join(done.err.split())
    done = rlquant("run", "ppo-qlora", *settings, "ppo.kv_cache=int5", "--out", tmp_path / "run")
    assert done.status == 2
    assert "fp8_e4m3" in done.err


@pytest.mark.slow
def test_a_reward_model_is_a_reward(
    rlquant: Run, folder: Path, pairs: Path, prompts: Path, check: Path, tmp_path: Path
) -> None:
    settings = (f"model={folder}", f"data={pairs}", "train.steps=10", "train.lr=3e-3", *SMALL[:6])
    assert rlquant("run", "reward-qlora", *settings, "--out", tmp_path / "reward").status == 0
    rewards = f"reward={{{tmp_path / 'reward' / 'reward'}: 0.5, '{check}:ones': 1}}"
    common = (f"model={folder}", f"data={prompts}", rewards, "adapters.rank=8", "samples=1", "merge=null")
    ppo = rlquant("run", "ppo-qlora", *common, *PPO[:-1], "ppo.steps=1", "--out", tmp_path / "ppo")
    assert ppo.status == 0, ppo.err
    grpo = ("train.steps=1", "train.batch=8", "answers=4", "new_tokens=4", "data.max_prompt=32")
    done = rlquant("run", "grpo-qlora", *common, *grpo, "--out", tmp_path / "grpo")
    assert done.status == 0, done.err
    assert math.isfinite(results(tmp_path / "grpo")["gain"]["tuned"])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{check}:twos", "unknown function in"),
        ("missing.py:ones", "is not there"),
        ("nowhere", "neither FILE.py:FUNCTION nor"),
        ("{check}:broken", "raised at row"),
        ("{folder}", "no finished reward model"),
    ],
)
@pytest.mark.parametrize("recipe", ["ppo-qlora", "grpo-qlora"])
def test_rewards_that_cannot_be(
    rlquant: Run,
    folder: Path,
    prompts: Path,
    check: Path,
    tmp_path: Path,
    reward: str,
    message: str,
    recipe: str,
) -> None:
    named = f"reward={reward.format(check=check, folder=folder)}"
    common = (f"model={folder}", f"data={prompts}", named, "adapters.rank=8", "merge=null")
    own = {
        "ppo-qlora": (*PPO[:-1], "ppo.steps=1"),
        "grpo-qlora": ("train.steps=1", "train.batch=8", "answers=4", "new_tokens=4", "data.max_prompt=32"),
    }[recipe]
    done = rlquant("run", recipe, *common, *own, "--out", tmp_path / "run")
    assert done.status == 2
    assert message in done.err


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(folder: Path, texts: Path, tmp_path: Path) -> None:
    settings = [
        f"model={folder}",
        f"data={texts}",
        "train.steps=12",
        "train.save_every=4",
        "merge=null",
        *SMALL[:6],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rlquant", "run", "sft-qlora", *settings, "--out", str(out)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "whole")
    broken = start(tmp_path / "broken")
    until = time.monotonic() + 300
    clock = tmp_path / "broken" / "pieces" / "seconds.json"
    while not clock.exists():
        assert broken.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    spent = json.loads(clock.read_text())["content"]["seconds"]
    assert list((tmp_path / "broken").glob("checkpoints/*/checkpoint-4/trainer_state.json"))
    assert not (tmp_path / "broken" / "results.json").exists()
    again = start(tmp_path / "broken")
    for process in (whole, again):
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
    one, other = (results(tmp_path / name) for name in ("whole", "broken"))
    assert other["training"]["losses"] == one["training"]["losses"]
    assert other["training"]["base_sha256"] == one["training"]["base_sha256"]
    assert other["rows"][0]["score"] == one["rows"][0]["score"]
    assert other["training"]["seconds"] > spent > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.precision=nf5", "nf5"),
        ("model.precision=w8a8", "needs calibration"),
        ("model.device=cuda:9", "torch sees"),
        ("train.optimizer=paged_adamw_8bit", "needs a CUDA device"),
        ("train.lr=1e-20", "vanish"),
        ("data=missing.jsonl", "there is no such file"),
        ("adapters.targets=[q_prj]", "Did you mean 'q_proj'"),
        ("data.max_prompt=4", "longer than data.max_length or data.max_prompt"),
    ],
)
def test_what_cannot_be(
    rlquant: Run, folder: Path, texts: Path, tmp_path: Path, setting: str, message: str
) -> None:
    settings = (
        f"model={folder}",
        f"data={texts}",
        "train.steps=1",
        *SMALL[:6],
        "data.too_long=fail",
        setting,
    )
    done = rlquant("run", "sft-qlora", *settings, "--out", tmp_path)
    assert done.status == 2
    assert message in done.err
