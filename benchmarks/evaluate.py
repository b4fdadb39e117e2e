"""How long an evaluation takes beside stock SB3's ``evaluate_policy``, in one process, on the same episodes.

Both load the same agent, run the same seeded episodes deterministically and return one score per episode. SB3
uses one environment (its default); one seed per episode is set by a wrapper, since ``evaluate_policy`` does not
seed. The two take turns, and the ratio of the medians is reported, so that a noisy machine slows both.

    python benchmarks/evaluate.py [--repeats 3] [--out benchmarks/evaluate.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3 as sb3
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from rlquant import catalog
from rlquant.control import load, rollout
from rlquant.runs import machine_info, package_versions

CASES = (("ppo-cartpole", sb3.PPO, 100), ("ppo-lunarlander", sb3.PPO, 50))
TARGET = 5.0


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """Episode ``i`` is reset with seed ``i``, as rlquant does."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Reset with the number of the episode; the constructor of a vector environment resets once more."""
        observation = self.env.reset(seed=self.episode, options=options)
        self.episode += 1
        return observation


def stock(name: str, cls: Any, episodes: int) -> tuple[float, list[float]]:
    """Seconds and returns of SB3's ``evaluate_policy``, loading included."""
    started = time.perf_counter()
    env = Monitor(SeededEpisodes(gym.make(catalog.agent_card(name)["env"])))
    model = cls.load(catalog.agent_folder(name) / "agent.zip", device="cpu")
    returns, _ = evaluate_policy(
        model, env, n_eval_episodes=episodes, return_episode_rewards=True, warn=False
    )
    return time.perf_counter() - started, returns


def ours(name: str, episodes: int) -> tuple[float, list[float]]:
    """Seconds and returns of ``rollout``, loading included."""
    started = time.perf_counter()
    returns = rollout(load(name), range(episodes), seed=0).returns
    return time.perf_counter() - started, returns.tolist()


def run(repeats: int) -> dict[str, Any]:
    """All cases, the two sides taking turns."""
    torch.set_num_threads(1)
    rows = []
    for name, cls, episodes in CASES:
        pairs = [(ours(name, episodes), stock(name, cls, episodes)) for _ in range(repeats)]
        np.testing.assert_allclose(pairs[0][0][1], pairs[0][1][1], rtol=1e-4)  # the same episodes
        seconds = [statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
        rows.append(
            {
                "agent": name,
                "episodes": episodes,
                "rlquant_s": round(seconds[0], 3),
                "sb3_s": round(seconds[1], 3),
                "ratio": round(seconds[1] / seconds[0], 2),
                "target": TARGET,
            }
        )
    today = datetime.date.today().isoformat()
    return {
        "date": today,
        "rows": rows,
        "repeats": repeats,
        "machine": machine_info(),
        "versions": package_versions(),
    }


def main() -> None:
    """Run, print a table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    document = run(arguments.repeats)
    print(f"{'agent':18}{'episodes':>9}{'rlquant s':>11}{'SB3 s':>9}{'ratio':>8}{'target':>8}")
    for row in document["rows"]:
        figures = f"{row['rlquant_s']:11.2f}{row['sb3_s']:9.2f}{row['ratio']:7.1f}x{row['target']:7.0f}x"
        print(f"{row['agent']:18}{row['episodes']:9}{figures}")
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
