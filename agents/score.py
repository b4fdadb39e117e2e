"""Measure the scores that the cards state: of shipped agents, and of uniformly random actions.

    python agents/score.py agents [NAME ...]      # 100 episodes each, seeds 10000 to 10099
    python agents/score.py random [ENV ...] [--episodes 1000]    # seeds from 20000

An agent is loaded by stock Stable-Baselines3 and plays one environment at a time with
``predict(deterministic=True)``; its score goes into ``agents/<name>/card.yml`` and, as ``trained_score``, into the
card of its environment. A random score goes into the environment's card.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sb3_contrib
import stable_baselines3
import torch
import yaml
from common import AGENTS, ENVS, env_spec, make_env, play, write_card, write_yaml
from stable_baselines3.common.base_class import BaseAlgorithm

from rlquant.control.environment import random_scores

AGENT_SEED, AGENT_EPISODES = 10_000, 100
RANDOM_SEED, RANDOM_EPISODES = 20_000, 1000
FIRST_EPISODES = 5  # listed one by one, for a quick check that a checkpoint still plays as measured


def load(name: str) -> BaseAlgorithm:
    """The shipped agent ``name``, loaded on the CPU by the Stable-Baselines3 class that its card names."""
    algorithm = yaml.safe_load((AGENTS / name / "card.yml").read_text())["algorithm"]
    kind = getattr(stable_baselines3, algorithm, None) or getattr(sb3_contrib, algorithm)
    return kind.load(AGENTS / name / "agent.zip", device="cpu")


def agent_returns(name: str, seeds: list[int]) -> list[float]:
    """The return of each episode that the agent ``name`` plays from ``env.reset(seed=seed)``."""
    torch.set_num_threads(1)
    card = yaml.safe_load((AGENTS / name / "card.yml").read_text())
    model, env = load(name), make_env(card["env"])
    return [play(model, env, seed) for seed in seeds]


def random_returns(env_id: str, seeds: list[int]) -> list[float]:
    """The return of each episode of uniformly random actions; a seed starts both actions and environment."""
    spec = env_spec(env_id)
    return [float(random_scores(spec, 1, seed)[0]) for seed in seeds]


def spread(returns: Callable[[list[int]], list[float]], seeds: list[int], processes: int) -> np.ndarray:
    """``returns`` of all ``seeds``, [episodes], in their order, by several processes."""
    if processes == 1:
        return np.array(returns(seeds))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        parts = pool.map(returns, [seeds[i::processes] for i in range(processes)])
    result = np.empty(len(seeds))
    for i, part in enumerate(parts):
        result[i::processes] = part
    return result


def score_agent(name: str, processes: int) -> None:
    """Measure the agent ``name`` and refresh its card and its environment's."""
    seeds = list(range(AGENT_SEED, AGENT_SEED + AGENT_EPISODES))
    returns = spread(functools.partial(agent_returns, name), seeds, processes)
    card = yaml.safe_load((AGENTS / name / "card.yml").read_text())
    card["score"] = {
        "mean": round(float(returns.mean()), 3),
        "std": round(float(returns.std(ddof=1)), 3),
        "min": round(float(returns.min()), 3),
        "episodes": AGENT_EPISODES,
        "seed": AGENT_SEED,
        "how": f"deterministic, env.reset(seed={AGENT_SEED} + i)",
        "first_episodes": [round(float(value), 6) for value in returns[:FIRST_EPISODES]],
    }
    write_card(AGENTS / name, card)
    _refresh_env(card["env"], "trained_score", {"mean": card["score"]["mean"], "agent": name}, better=True)
    print(f"{name}: {returns.mean():.1f} +- {returns.std(ddof=1):.1f}, least {returns.min():.1f}", flush=True)


def score_random(env_id: str, episodes: int, processes: int) -> None:
    """Measure random actions on ``env_id`` and refresh its card."""
    seeds = list(range(RANDOM_SEED, RANDOM_SEED + episodes))
    returns = spread(functools.partial(random_returns, env_id), seeds, processes)
    score: dict[str, Any] = {
        "mean": round(float(returns.mean()), 3),
        "std": round(float(returns.std(ddof=1)), 3),
        "episodes": episodes,
        "seed": RANDOM_SEED,
    }
    _refresh_env(env_id, "random_score", score)
    print(f"{env_id}: random {returns.mean():.1f} +- {returns.std(ddof=1):.1f}", flush=True)


def _refresh_env(env_id: str, key: str, score: dict[str, Any], better: bool = False) -> None:
    """Put ``score`` under ``key`` into the card of ``env_id``; ``better``: only over a lower one."""
    path = ENVS / f"{env_id}.yml"
    card = yaml.safe_load(path.read_text())
    held = card[key]
    if better and held and held["agent"] != score["agent"] and held["mean"] >= score["mean"]:
        return
    write_yaml(path, {**card, key: score})


def names(folder: Path, pattern: str) -> list[str]:
    """What a folder holds: names of agents or of environment cards."""
    return sorted(path.parent.name if path.name == "card.yml" else path.stem for path in folder.glob(pattern))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["agents", "random"])
    parser.add_argument("names", nargs="*", help="all of them, if none is named")
    parser.add_argument("--episodes", type=int, default=RANDOM_EPISODES, help="of random actions")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.what == "agents":
        for name in given.names or names(AGENTS, "*/card.yml"):
            score_agent(name, given.processes)
    else:
        for env_id in given.names or names(ENVS, "*.yml"):
            score_random(env_id, given.episodes, given.processes)


if __name__ == "__main__":
    main()
