"""Every user's mistake: one clear sentence, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO CartPole checkpoint, untrained."""
    path = tmp_path_factory.mktemp("agent") / "agent.zip"
    sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(path)
    return path


@pytest.fixture
def refused(rlquant: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Run ``evaluate`` and check that it is refused in one sentence and leaves nothing behind."""

    def run(*arguments: object, says: tuple[str, ...]) -> str:
        out = tmp_path / "out"
        done = rlquant("evaluate", *arguments, "--out", out)
        assert done.status == 2, done
        assert done.out == ""
        assert done.err.startswith("rlquant: error: ")
        assert done.err.count("\n") == 1
        assert "Traceback" not in done.err
        for words in says:
            assert words in done.err
        assert not list(out.rglob("*.tmp"))
        assert not (out / "results.json").exists()
        return str(done.err)

    return run


def change(source: Path, target: Path, edit: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of a zip whose members were edited."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target


CARTPOLE = ("--env", "CartPole-v1", "--episodes", "2")


def test_missing_file(refused: Callable[..., str]) -> None:
    refused("no/such/agent.zip", says=("does not exist", "ppo-cartpole"))


def test_misspelt_agent(refused: Callable[..., str]) -> None:
    refused("ppo-cartpol", says=("Did you mean the shipped agent 'ppo-cartpole'",))


def test_bare_zip_without_environment(agent: Path, refused: Callable[..., str]) -> None:
    refused(agent, says=("--env",))


def test_text_that_is_no_zip(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "notes.zip").write_text("hello")
    refused(tmp_path / "notes.zip", *CARTPOLE, says=("is no zip file",))


def test_zip_that_is_no_sb3_zip(tmp_path: Path, refused: Callable[..., str]) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "other.zip", *CARTPOLE, says=("is no Stable-Baselines3 zip", "readme.txt"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated_zip(agent: Path, tmp_path: Path, share: float, refused: Callable[..., str]) -> None:
    content = agent.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "cut.zip", *CARTPOLE, says=("truncated or damaged",))


def test_flipped_bytes_inside_the_weights(agent: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    content = bytearray(agent.read_bytes())
    at = content.find(b"policy.pth") + 2000
    content[at : at + 50] = b"\xff" * 50
    (tmp_path / "bad.zip").write_bytes(content)
    refused(tmp_path / "bad.zip", *CARTPOLE, says=("truncated or damaged",))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_weights_that_are_not_finite(
    agent: Path, tmp_path: Path, poison: float, refused: Callable[..., str]
) -> None:
    model = sb3.PPO.load(agent, device="cpu")
    with torch.no_grad():
        model.policy.action_net.weight[0, 0] = poison
    model.save(tmp_path / "poisoned.zip")
    refused(tmp_path / "poisoned.zip", *CARTPOLE, says=("NaN or Inf", "action_net.weight"))


def test_damaged_json(agent: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = change(agent, tmp_path / "bad.zip", lambda members: members.update(data=b"{"))
    refused(path, *CARTPOLE, says=("'data' is not JSON",))


def test_unknown_policy_class(agent: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    def edit(members: dict[str, bytes]) -> None:
        data = json.loads(members["data"])
        data["policy_class"]["__module__"] = "my_project.policies"
        members["data"] = json.dumps(data).encode()

    path = change(agent, tmp_path / "custom.zip", edit)
    refused(path, *CARTPOLE, says=("my_project.policies", "--trust"))


def test_unknown_environment(agent: Path, refused: Callable[..., str]) -> None:
    refused(agent, "--env", "CartPol-v1", says=("CartPol-v1", "Did you mean 'CartPole-v1'"))


def test_environment_with_other_spaces(agent: Path, refused: Callable[..., str]) -> None:
    refused(agent, "--env", "Pendulum-v1", says=("Pendulum-v1 has observations box(3) and actions box(1)",))


def test_observations_that_fit_but_actions_that_do_not(tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "a.zip"
    sb3.A2C("MlpPolicy", "Acrobot-v1", device="cpu").save(path)
    refused(path, "--env", "CartPole-v1", says=("actions discrete(2)",))


def test_unknown_precision(agent: Path, refused: Callable[..., str]) -> None:
    refused(agent, *CARTPOLE, "--precisions", "fp32,in8", says=("'in8'", "Did you mean 'int8'"))


def test_unknown_method_runtime_and_device(agent: Path, refused: Callable[..., str]) -> None:
    refused(agent, *CARTPOLE, "--method", "rnt", says=("Did you mean 'rtn'",))
    refused(agent, *CARTPOLE, "--runtime", "torhc", says=("Did you mean 'torch'",))
    refused(agent, *CARTPOLE, "--device", "gpu", says=("cuda",))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--episodes", 0),
        ("--episodes", -3),
        ("--margin", 1.5),
        ("--confidence", 2),
        ("--seed", -1),
        ("--workers", 0),
        ("--batch", 0),
        ("--calibration-episodes", 0),
        ("--precisions", ","),
    ],
)
def test_numbers_out_of_range(agent: Path, option: str, value: object, refused: Callable[..., str]) -> None:
    refused(agent, "--env", "CartPole-v1", option, value, says=())


def test_unknown_option_suggests_the_nearest(rlquant: Callable[..., Any], agent: Path) -> None:
    done = rlquant("evaluate", agent, "--episode", 3)
    assert done.status == 2
    assert "--episodes" in done.err


def test_output_folder_that_cannot_be_written(
    rlquant: Callable[..., Any], agent: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    done = rlquant("evaluate", agent, *CARTPOLE, "--out", tmp_path / "file" / "run")
    assert done.status == 2
    assert "cannot be created" in done.err
    assert (tmp_path / "file").read_text() == "in the way"


def test_normaliser_that_is_declared_but_missing(
    zoo: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(zoo / "ars/Pendulum-v1_1", tmp_path / "agent", copy_function=shutil.copyfile)
    (tmp_path / "agent/Pendulum-v1/vecnormalize.pkl").unlink()
    refused(tmp_path / "agent", "--episodes", 2, says=("normalised", "vecnormalize.pkl is missing"))


def test_normaliser_of_another_shape(agent: Path, zoo: Path, refused: Callable[..., str]) -> None:
    other = zoo / "ars/Pendulum-v1_1/Pendulum-v1/vecnormalize.pkl"
    refused(agent, *CARTPOLE, "--normaliser", other, says=("[3]", "[4]"))


def test_empty_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", says=("no known kind",))


def test_options_that_would_be_ignored_are_refused(
    zoo: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    refused(
        "ppo-cartpole", "--normaliser", tmp_path / "vecnormalize.pkl", says=("--normaliser is for a bare",)
    )
    refused(
        zoo / "ppo/CartPole-v1_1", "--normaliser", tmp_path / "x.pkl", says=("--normaliser is for a bare",)
    )
    refused("ppo-cartpole", "--max-episodes", -5, says=("--max-episodes",))


def test_a_bad_option_value_is_one_sentence(refused: Callable[..., str], agent: Path) -> None:
    refused(agent, "--episodes", "many", says=("'--episodes'", "integer"))


def test_counts_are_checked_before_a_folder_is_made(
    rlquant: Callable[..., Any], agent: Path, tmp_path: Path
) -> None:
    assert rlquant("evaluate", agent, *CARTPOLE, "--workers", 0, "--out", tmp_path / "run").status == 2
    assert not (tmp_path / "run").exists()


def test_scores_are_not_reused_under_another_normaliser(
    rlquant: Callable[..., Any], zoo: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.zip"
    shutil.copyfile(zoo / "ars/Pendulum-v1_1/best_model.zip", bare)
    budget = ("--env", "Pendulum-v1", "--precisions", "fp32", "--episodes", 2, "--out", tmp_path / "run")
    scores = []
    for more in ((), ("--normaliser", zoo / "ars/Pendulum-v1_1/Pendulum-v1/vecnormalize.pkl")):
        assert rlquant("evaluate", bare, *budget, *more).status == 0
        document = json.loads((tmp_path / "run/results.json").read_text())
        scores.append(document["rows"][0]["score"]["mean"])
    assert scores[0] != scores[1]
