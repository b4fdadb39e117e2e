"""Results documents like those of real evaluations, made with the real statistics from simulated episodes."""

import re
import zlib

import numpy as np

from rlquant.measure import (
    Agreement,
    Latency,
    Measurement,
    QGap,
    Retention,
    Score,
    Size,
    compare,
    results_document,
    weight_histogram,
)

LAYERS = {"actor.0": (64, 8), "actor.2": (64, 64), "actor.4": (4, 64)}


def bits(precision):
    """Weight bits, from the name: int4, w4a8-g32, fp32, nf4."""
    return int(re.search(r"\d+", precision)[0])


def generator(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def histograms(precision):
    if bits(precision) > 8:
        return ()
    made = []
    for layer, shape in LAYERS.items():
        weight = generator(layer).normal(0, 1 / np.sqrt(shape[1]), shape)
        scale = np.abs(weight).max(axis=1, keepdims=True) / (2.0 ** (bits(precision) - 1) - 1)
        quantized = np.round(weight / scale) * scale
        sqnr = 10 * np.log10((weight**2).sum() / ((weight - quantized) ** 2).sum())
        made.append(weight_histogram(layer, weight, quantized, sqnr_db=sqnr))
    return tuple(made)


def latency(precision):
    slower = 1 + 0.1 * generator(precision).random()
    return Latency(*(slower * t for t in (21.3, 24.0, 31.7, 88.0, 204.0)), 2000, precision != "fp32")


def document(
    scores, *, random_score, algorithm, env, kind="control", parameters=4800, q_values=False, **parts
):
    """A document from ``scores``: {precision: array [episodes]}, whose first entry is the reference."""
    reference = next(iter(scores))
    rows = []
    for precision, episodes in scores.items():
        same = precision == reference
        gap = QGap(0.02, 0.2, 3.1, 0.0 if same else 0.31) if q_values else None
        packed = parameters * bits(precision) // 8 + (0 if precision in ("fp32", "bf16") else 528)
        rows.append(
            Measurement(
                precision=precision,
                method="none" if same else "rtn",
                runtime="torch",
                score=Score.from_episodes(episodes),
                retention=Retention.of_reference()
                if same
                else compare(scores[reference], episodes, random_score=random_score),
                bytes=Size(packed, packed + 2100),
                compression=4 * parameters / packed,
                agreement=Agreement(1.0, 0.0, gap)
                if same
                else Agreement(1 - 0.4 / bits(precision), 0.37, gap),
                latency=latency(precision),
                weights=histograms(precision),
            ).to_row()
        )
    n = len(scores[reference])
    defaults = {
        "subject": {
            "source": f"zoo/{algorithm.lower()}/{env}_1",
            "kind": kind,
            "algorithm": algorithm,
            "env": env,
            "parameters": parameters,
            "sha256": "9f2c6f0d5b7a41" + "0" * 50,
        },
        "settings": {
            "episodes": n,
            "seed": 0,
            "margin": 0.02,
            "confidence": 0.95,
            "method": "rtn",
            "precisions": list(scores),
            "calibration": {"episodes": 10, "seed": 1_000_000, "observer": "mse"},
        },
        "machine": {"cpu": "Intel Xeon, 2 cores", "memory_gib": 32.0, "system": "Linux 6.1 x86_64"},
        "versions": {
            "rlquant": "0.1.0",
            "python": "3.11.7",
            "torch": "2.13.0",
            "stable-baselines3": "2.9.2",
            "gymnasium": "1.4.0",
            "numpy": "2.4.6",
        },
        "reference": {"precision": reference, "random_score": random_score},
        "rows": rows,
    }
    return results_document(**(defaults | parts))


def cartpole():
    """PPO that keeps everything at 8 bits and little at 4."""
    rng = generator("cartpole")
    full = np.full(100, 500.0)
    return document(
        {
            "fp32": full,
            "bf16": full,
            "int8": full,
            "w8a8": np.where(np.arange(100) % 25 == 3, 487.0, full),
            "int4": np.clip(rng.normal(470, 60, 100), 60, 500).round(),
            "w4a8": np.clip(rng.normal(310, 120, 100), 40, 500).round(),
        },
        random_score=22.3,
        algorithm="PPO",
        env="CartPole-v1",
    )


def heavy_loss():
    """DQN whose argmax flips: 500 -> 59 at eight bits."""
    rng = generator("dqn")
    full = np.full(20, 500.0)
    return document(
        {
            "fp32": full,
            "bf16": np.where(np.arange(20) == 7, 431.0, full),
            "int8": rng.normal(59, 14, 20).round(),
            "int4": rng.normal(15, 3, 20).round(),
        },
        random_score=22.3,
        algorithm="DQN",
        env="CartPole-v1",
        parameters=67_586,
        q_values=True,
    )


def wide_intervals():
    """TQC on MuJoCo with few episodes: little can be decided."""
    rng = generator("hopper")
    base = rng.normal(3437, 400, 10)
    return document(
        {
            "fp32": base,
            "bf16": base + rng.normal(0, 250, 10),
            "int8": base + rng.normal(120, 500, 10),
            "w8a8": base + rng.normal(-90, 600, 10),
            "int4": rng.normal(157, 60, 10),
        },
        random_score=18.4,
        algorithm="TQC",
        env="Hopper-v5",
        parameters=139_000,
    )


def negative_returns():
    """SAC Pendulum: all returns are negative; a raw ratio would call a loss a gain."""
    rng = generator("pendulum")
    base = -np.abs(rng.normal(153, 80, 50))
    return document(
        {
            "fp32": base,
            "bf16": base + rng.normal(0, 1, 50),
            "int8": base + rng.normal(0, 3, 50),
            "w8a8": base + rng.normal(-4, 8, 50),
            "int4": base - np.abs(rng.normal(150, 60, 50)),
            "int2": -np.abs(rng.normal(1262, 200, 50)),
        },
        random_score=-1220.0,
        algorithm="SAC",
        env="Pendulum-v1",
    )


def twenty_rows():
    """A sweep of 20 schemes, from harmless to ruinous."""
    rng = generator("sweep")
    base = rng.normal(240, 25, 30)
    scores = {"fp32": base}
    for i in range(19):
        scores[f"w{8 - i // 3}a8-g{2 ** (4 + i % 3)}"] = base - 0.8 * i**1.6 + rng.normal(0, 12, 30)
    return document(scores, random_score=-180.0, algorithm="PPO", env="LunarLander-v3")


def language():
    """A language model: the score is the negative mean loss per prompt; no latency, no agreement."""
    rng = generator("language")
    base = -np.abs(rng.normal(3.4, 0.5, 64))
    made = document(
        {"bf16": base, "nf4": base - np.abs(rng.normal(0.17, 0.05, 64)), "int8": base - 0.002},
        random_score=-10.8,
        algorithm="SFT",
        env="wikitext",
        kind="language",
    )
    for row in made["rows"]:
        row.update(agreement=None, latency_us=None)
        del row["weights"]
    return made


def bad_reference():
    """A reference no better than random: nothing can be judged."""
    rng = generator("bad")
    return document(
        {"fp32": rng.normal(22, 6, 20), "int8": rng.normal(22, 6, 20)},
        random_score=22.3,
        algorithm="A2C",
        env="CartPole-v1",
    )


def reference_only():
    """One row, one episode."""
    return document({"fp32": [500.0]}, random_score=22.3, algorithm="PPO", env="CartPole-v1")


ALL = (
    cartpole,
    heavy_loss,
    wide_intervals,
    negative_returns,
    twenty_rows,
    language,
    bad_reference,
    reference_only,
)
