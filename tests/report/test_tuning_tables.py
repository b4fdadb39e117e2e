"""What a search found, in a terminal."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from rlquant.report import front_table, sensitivity_table


def printed(table: Any) -> str:
    console = Console(width=120, file=StringIO())
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def tensor(index: int, bits: int, divergence: float, retention: float | None) -> dict[str, Any]:
    return {
        "layer": f"layers.{index}.mlp",
        "role": "mlp",
        "tensor": "weights",
        "bits": bits,
        "divergence": divergence,
        "retention": retention,
    }


def test_the_costliest_tensors_are_shown_in_order_of_the_network() -> None:
    rows = [tensor(index, bits, (index % 7 + 1) / bits, None) for index in range(40) for bits in (8, 2)]
    text = printed(sensitivity_table(rows, most=10))
    assert "Divergence from the float model" in text
    shown = [int(line.split(".")[1]) for line in text.splitlines() if line.strip().startswith("layers.")]
    assert shown == sorted(shown)
    assert set(shown) == {6, 13, 20, 27, 34} | set(shown) & {5, 12, 19, 26, 33, 39}
    assert len(shown) == 10
    assert "3.50000" in text
    assert "30 that cost less are in tune.json" in text


def test_a_reward_that_was_measured_is_what_is_shown() -> None:
    text = printed(sensitivity_table([tensor(0, 8, 0.1, 0.987), tensor(1, 8, 0.1, float("nan"))]))
    assert "Reward kept with one tensor alone" in text
    assert "98.7%" in text
    assert "tune.json" not in text


def test_the_front_counts_what_auditions_are_made_of() -> None:
    name = "int4-g128+layers.0.*=int8+layers.1.*=int8+layers.2.*=int8+embedding=int8"
    trial = {
        "scheme": name,
        "method": "gptq",
        "bytes": 2048,
        "retention": 0.99,
        "episodes": 8,
        "passed": True,
    }
    text = printed(front_table([trial], "windows"))
    assert "windows" in text
    assert "int4-g128+embedding=int8+3 exceptions" in text
    assert "passes" in text
