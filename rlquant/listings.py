"""What the commands ``ls``, ``env`` and ``formats`` print."""

from __future__ import annotations

import math
import sys
from typing import Any

from rlquant import catalog
from rlquant.runs import machine_info, package_versions

__all__ = ["print_environment", "print_formats", "print_listing"]


def print_listing(kind: str) -> None:
    """Print the catalog's ``agents``, ``envs`` or ``recipes``, or the ``schemes``."""
    {"agents": _agents, "envs": _envs, "recipes": _recipes, "schemes": _schemes}[kind]()


def print_environment() -> None:
    """Print versions and hardware."""
    for name, value in {**machine_info(), **package_versions()}.items():
        print(f"{name}: {value}")


def print_formats(name: str | None, value: float | None) -> None:
    """Print all number formats, or one in detail; with ``value``, how it is stored."""
    import torch

    from rlquant.quant import FORMATS, get_format

    chosen = [get_format(name)] if name else list(FORMATS.values())
    columns = ["format", "bits", "layout", "smallest step", "largest"]
    if value is not None:
        columns += [f"{value:g} becomes", "relative error"]
    rows = []
    for fmt in chosen:
        row = [fmt.name, str(fmt.bits), fmt.layout, f"{fmt.smallest_step:.4g}", f"{fmt.max:.6g}"]
        if value is not None:
            stored = float(fmt.cast(torch.tensor([value], dtype=torch.float32))[0])
            error = abs(stored - value) / abs(value) if value else 0.0
            row += [f"{stored:.9g}", f"{error:.2%}" if math.isfinite(error) else "-"]
        rows.append(row)
    _print_table(columns, rows)
    if value is not None and any(fmt.kind == "int" for fmt in chosen):
        print("\nInteger formats store multiples of a scale; shown for a scale of 1.")
    if name and chosen[0].bits <= 8:
        numbers = [f"{number:g}" for number in chosen[0].values().tolist()]
        print(f"\n{len(numbers)} values: {' '.join(numbers)}")


def _agents() -> None:
    rows = []
    for name in catalog.agents():
        card = catalog.agent_card(name)
        score = card["score"]
        rows.append(
            [
                name,
                card["algorithm"],
                card["env"],
                card["network"],
                f"{score['mean']:.1f} ± {score['std']:.1f}",
            ]
        )
    _print_table(["agent", "algorithm", "environment", "network", "score"], rows)


def _envs() -> None:
    rows = []
    for env_id in catalog.envs():
        card: dict[str, Any] = catalog.env_card(env_id) or {}
        trained = card.get("trained_score") or {}
        shown = f"{trained['mean']:.1f}" if trained else "-"
        rows.append([env_id, f"{card['control_rate_hz']:g}", f"{card['random_score']['mean']:.1f}", shown])
    _print_table(["environment", "control rate (Hz)", "random score", "trained score"], rows)


def _recipes() -> None:
    import ast

    configs = catalog.recipe_configs()
    rows = []
    for name in catalog.recipes():
        source = catalog.recipe_file(name).read_text(encoding="utf-8")
        about = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
        settings = [each for each in configs if each == name or each.startswith(f"{name}-")]
        rows.append([name, ", ".join(settings), about])
    _print_table(["recipe", "settings", ""], rows)


def _schemes() -> None:
    from rlquant.control.methods import AGENT_METHODS
    from rlquant.quant import OBSERVERS, SCHEME_EXAMPLES, Scheme, scheme_choices

    rows = []
    for name in scheme_choices():
        scheme = Scheme.parse(name)
        activations = scheme.activations.name if scheme.activations else "fp32"
        grain = scheme.granularity
        per = f"group of {grain.group_size}" if grain.group_size else grain.kind
        rows.append([name, scheme.weights.name, activations, per if scheme.weights.is_scaled else "-"])
    _print_table(["scheme", "weights", "activations", "scale per"], rows)
    print(f"\nwXaY takes 2 to 16 bits each, as in {', '.join(SCHEME_EXAMPLES)}.")
    print(f"Suffixes: -gN -tensor -asym -dynamic and an observer ({', '.join(OBSERVERS)}).")
    print(f"Methods, which combine with +, as in center+gptq+bias: {', '.join(AGENT_METHODS)}.")


def _print_table(columns: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width: whole rows, so that grep and cut work.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)
