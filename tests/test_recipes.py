"""Recipes: found by name or path, their settings checked as a whole, copied, and run in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlquant import catalog
from rlquant.running import find_recipe

Run = Callable[..., Any]

SCRIPT = '''"""Writes what it is given.

And more.
"""

import json
from typing import ClassVar, Literal

from pydantic import Field

from rlquant.config import Section


class Data(Section):
    shorthand: ClassVar[str] = "path"
    path: str
    limit: int | None = Field(None, ge=1)
    bad_rows: Literal["skip", "fail"] = "fail"


class Train(Section):
    lr: float = Field(1e-5, gt=0)
    steps: int = 10


class Config(Section):
    model: str = "tiny"
    data: Data
    train: Train = Train()
    more: Train | None = Train(steps=3)


def main(config, run):
    run.write("seen.json", json.dumps(config.model_dump()))
    return 3 if config.train.steps == 0 else None
'''


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "toy.py").write_text(SCRIPT)
    (tmp_path / "toy.yml").write_text(
        "recipe: toy\ndata: {path: default.jsonl, limit: 5}\ntrain: {steps: 7}\n"
    )
    (tmp_path / "toy-small.yml").write_text("recipe: toy\ndata: small.jsonl\n")
    return tmp_path / "toy.py"


def seen(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "seen.json").read_text()))


def test_settings_defaults_file_and_overrides(rlquant: Run, recipe: Path, tmp_path: Path) -> None:
    options = ("data=my=own.jsonl", "train.lr=5e-6", "--out", tmp_path / "run")
    assert rlquant("run", recipe, *options).status == 0
    found = seen(tmp_path / "run")
    assert found["data"] == {"path": "my=own.jsonl", "limit": 5, "bad_rows": "fail"}
    assert found["train"] == {"lr": 5e-6, "steps": 7}
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["config"]["train"]["lr"] == 5e-6
    assert settings["versions"]["rlquant"]


def test_a_section_that_may_be_left_out(rlquant: Run, recipe: Path, tmp_path: Path) -> None:
    recipe.with_suffix(".yml").write_text("recipe: toy\ndata: a.jsonl\ntrain:\nmore: {lr: 0.5}\n")
    for number, (overrides, expected) in enumerate(
        [
            ((), {"lr": 0.5, "steps": 10}),
            (("more=null",), None),
            (("more=null", "more.steps=4"), {"lr": 1e-5, "steps": 4}),
        ]
    ):
        assert rlquant("run", recipe, *overrides, "--out", tmp_path / str(number)).status == 0
        assert seen(tmp_path / str(number))["more"] == expected
        assert seen(tmp_path / str(number))["train"] == {"lr": 1e-5, "steps": 10}


def test_other_settings(rlquant: Run, recipe: Path, tmp_path: Path) -> None:
    for number, arguments in enumerate(
        [(recipe, "--config", recipe.with_name("toy-small.yml")), (recipe.with_name("toy-small.yml"),)]
    ):
        assert rlquant("run", *arguments, "--out", tmp_path / str(number)).status == 0
        assert seen(tmp_path / str(number))["data"]["path"] == "small.jsonl"
        assert seen(tmp_path / str(number))["train"]["steps"] == 10


def test_the_status_is_the_recipes(rlquant: Run, recipe: Path, tmp_path: Path) -> None:
    assert rlquant("run", recipe, "train.steps=0", "--out", tmp_path / "run").status == 3


def test_all_mistakes_are_reported_at_once(rlquant: Run, recipe: Path, tmp_path: Path) -> None:
    wrong = (
        "train.lrr=1",
        "train.lr=-1",
        "data.bad_rows=drop",
        "data.limit=some",
        "modell=x",
        "train.steps=x",
    )
    done = rlquant("run", recipe, *wrong, "--out", tmp_path / "run")
    assert done.status == 2
    assert "6 mistakes" in done.err
    for part in ("'train.lrr'; did you mean 'train.lr'", "train.lr = -1", "data.bad_rows = 'drop'", "'skip' or 'fail'",
                 "data.limit = 'some'", "'modell'; did you mean 'model'", "train.steps = 'x'"):  # fmt: skip
        assert part in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr"], "'train.lr' is no override"),
        (["train=5"], "train = 5 is a section: set train.lr, train.steps"),
        (["train.lr=.nan"], "train.lr = nan"),
        (["data.path.x=1"], "data.path"),
    ],
)
def test_overrides_that_cannot_be(rlquant: Run, recipe: Path, overrides: list[str], message: str) -> None:
    done = rlquant("run", recipe, *overrides)
    assert done.status == 2
    assert message in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recipe: toy\ntrain: [", "is not YAML"),
        ("- 1\n", "holds no mapping"),
        ("train: {}\n", "names no recipe"),
        ("recipe: nothing\n", "unknown recipe 'nothing'"),
        ("recipe: toy\n", "data is missing: set data="),
    ],
)
def test_settings_that_cannot_be(rlquant: Run, recipe: Path, content: str, message: str) -> None:
    file = recipe.with_name("bad.yml")
    file.write_text(content)
    for command in ("run", "validate"):
        done = rlquant(command, file)
        assert done.status == 2
        assert message in done.err


def test_what_is_no_recipe(rlquant: Run, tmp_path: Path) -> None:
    done = rlquant("run", "dpo-qlorra")
    assert done.status == 2
    assert "unknown recipe 'dpo-qlorra'" in done.err
    (tmp_path / "empty.py").write_text("x = 1\n")
    done = rlquant("run", tmp_path / "empty.py")
    assert done.status == 2
    assert "is no recipe" in done.err
    done = rlquant("run", tmp_path / "missing.py")
    assert done.status == 2


def test_validate_says_so(rlquant: Run, recipe: Path) -> None:
    done = rlquant("validate", recipe.with_suffix(".yml"))
    assert done.status == 0
    assert "all good" in done.out


@pytest.mark.parametrize("name", list(catalog.recipe_configs()))
def test_every_shipped_yaml_is_good(rlquant: Run, name: str) -> None:
    path = catalog.recipe_configs()[name]
    assert rlquant("validate", path).status == 0
    assert yaml.safe_load(path.read_text())["recipe"] in catalog.recipes()


@pytest.mark.parametrize("name", catalog.recipes())
def test_a_copied_recipe_is_the_same(rlquant: Run, name: str, tmp_path: Path) -> None:
    assert rlquant("cp", name, tmp_path).status == 0
    copied = find_recipe(str(tmp_path / f"{name}.py"))
    assert copied.settings == tmp_path / f"{name}.yml"
    assert copied.config()[1].model_dump() == find_recipe(name).config()[1].model_dump()
    done = rlquant("cp", name, tmp_path)
    assert done.status == 2
    assert "is there already" in done.err
    assert name in rlquant("ls", "recipes").out
    assert len(catalog.recipe_file(name).read_text().splitlines()) <= 200


def test_agents_and_environments_are_copied_too(rlquant: Run, tmp_path: Path) -> None:
    assert rlquant("cp", "ppo-cartpole", tmp_path).status == 0
    assert (tmp_path / "ppo-cartpole" / "agent.zip").exists()
    assert rlquant("cp", "Pendulum-v1", tmp_path).status == 0
    assert (tmp_path / "Pendulum-v1.yml").exists()
    assert "Did you mean 'ppo-cartpole'" in rlquant("cp", "ppo-cartpol", tmp_path).err
