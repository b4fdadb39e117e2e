"""Training quantized from scratch beside training in float: the same steps, seeds and hyper-parameters.

Hyper-parameters are those of rl-baselines3-zoo (hyperparams/ppo.yml, sac.yml). What each training ends with,
not its best checkpoint, plays the same episodes. ``rounded`` is the float policy rounded to nearest after
training, on calibration episodes of its own.

    python benchmarks/qat.py [--scheme w4a8] [--seeds 0 1 2] [--episodes 100] [--out benchmarks/qat.md]

Finished trainings are kept in ``runs/qat.json`` under their settings; an interrupted benchmark goes on there.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import LinearSchedule

from rlquant import catalog
from rlquant.control import Agent, collect, from_sb3, quantize_agent, rollout
from rlquant.control.qat_sb3 import QuantizationCallback, quantized_agent
from rlquant.measure import compare
from rlquant.runs import write_atomic

CACHE = Path("runs/qat.json")
NOTE = (
    "Mean returns of what a training ends with, on the same episodes; for all seeds mean ± standard deviation of "
    "the seeds' means. Kept: share of the fp32 reward above random play, with the verdict at margin 0.02, episodes "
    "paired by seed."
)
SCORE_SEED, CALIBRATION_SEED = 10_000, 500_000


Trial = Callable[["Case", str, int, int], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A training of the zoo, and when it becomes quantized."""

    algorithm: Any
    env: str
    steps: int
    delay: int
    n_envs: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.algorithm.__name__} {self.env}"


CASES = (
    Case(
        PPO,
        "CartPole-v1",
        steps=100_000,
        delay=10_000,
        n_envs=8,
        settings={
            "n_steps": 32,
            "batch_size": 256,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "n_epochs": 20,
            "ent_coef": 0.0,
            "learning_rate": LinearSchedule(0.001, 0.0, 1.0),
            "clip_range": LinearSchedule(0.2, 0.0, 1.0),
        },
    ),
    Case(SAC, "Pendulum-v1", steps=20_000, delay=2_000, settings={"learning_rate": 1e-3}),
)


def train(case: Case, seed: int, callback: QuantizationCallback | None) -> Any:
    """The model after training."""
    env = make_vec_env(case.env, n_envs=case.n_envs, seed=seed)
    model = case.algorithm("MlpPolicy", env, seed=seed, device="cpu", **case.settings)
    return model.learn(case.steps, callback=callback)


def returns(agent: Agent, episodes: int) -> list[float]:
    """One return per episode."""
    return rollout(agent, range(episodes), seed=SCORE_SEED).returns.tolist()


def trial_float(case: Case, scheme: str, seed: int, episodes: int) -> dict[str, Any]:
    """Returns of the float policy and of its rounded copy on the same episodes."""
    model = train(case, seed, None)
    agent = from_sb3(model)
    rounded = quantize_agent(agent, scheme, inputs=collect(agent, 8, seed=CALIBRATION_SEED))
    return {"fp32": returns(agent, episodes), "rounded": returns(rounded, episodes)}


def trial_quantized(case: Case, scheme: str, seed: int, episodes: int) -> dict[str, Any]:
    """Returns of the policy that was trained quantized."""
    model = train(case, seed, QuantizationCallback(scheme, delay=case.delay))
    return {"qat": returns(quantized_agent(model), episodes)}


def kept(trial: Trial, case: Case, scheme: str, seed: int, episodes: int) -> dict[str, Any]:
    """A trial's result, from an earlier run where that finished it."""
    key = f"{trial.__name__} {case.name} {case.steps} {case.delay} {scheme} {seed} {episodes}"
    cache: dict[str, Any] = json.loads(CACHE.read_text()) if CACHE.exists() else {}
    if key not in cache:
        cache[key] = trial(case, scheme, seed, episodes)
        CACHE.parent.mkdir(exist_ok=True)
        write_atomic(CACHE, json.dumps(cache).encode())
    return dict(cache[key])


def rows(case: Case, trials: dict[int, dict[str, Any]]) -> list[str]:
    """A line per seed, and one for all."""
    card = catalog.env_card(case.env)
    assert card is not None
    random_score = float(card["random_score"]["mean"])
    lines = []
    for seed, result in trials.items():
        means = [f"{np.mean(result[kind]):,.1f}" for kind in ("fp32", "rounded", "qat")]
        lines.append(f"| {case.name} | {seed} | {' | '.join(means)} | |")
    pooled = {kind: np.concatenate([r[kind] for r in trials.values()]) for kind in ("fp32", "rounded", "qat")}
    cells = []
    for kind, scores in pooled.items():
        spread = np.std([np.mean(r[kind]) for r in trials.values()], ddof=1) if len(trials) > 1 else 0.0
        cells.append(f"{scores.mean():,.1f} ± {spread:,.1f}")
    retention = compare(pooled["fp32"], pooled["qat"], random_score=random_score)
    share = f"{100 * retention.value:.1f}% ({retention.verdict})"
    return [*lines, f"| **{case.name}** | all | {' | '.join(cells)} | {share} |"]


def main() -> None:
    """Run all trials and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = ["training", "seed", "fp32", f"{arguments.scheme} rounded", f"{arguments.scheme} trained so"]
    head.append("kept of fp32")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in CASES:
        trials: dict[int, dict[str, Any]] = {}
        for seed in arguments.seeds:
            setting = (case, arguments.scheme, seed, arguments.episodes)
            trials[seed] = kept(trial_float, *setting) | kept(trial_quantized, *setting)
            print(rows(case, {seed: trials[seed]})[0], flush=True)
        lines += rows(case, trials)
    command = (
        f"python benchmarks/qat.py --scheme {arguments.scheme} --seeds {' '.join(map(str, arguments.seeds))} "
        f"--episodes {arguments.episodes}"
    )
    lines += ["", NOTE, "", f"`{command}`, {datetime.date.today().isoformat()}."]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
