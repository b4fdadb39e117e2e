"""The recipe qat-control: trains, resumes to the bit, compares on paired episodes, and refuses what cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from safetensors.torch import load_file
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from rlquant import catalog
from rlquant.control import load, load_artifact
from rlquant.control.sb3_start import AgentSettings, SB3Settings, find_start, new_model
from rlquant.control.sb3_training import Training, fit
from rlquant.errors import InputError
from rlquant.quant import MixedScheme

Run = Callable[..., Any]

TINY = (
    *("sb3.n_steps=128", "sb3.n_epochs=1", "n_envs=2", "timesteps=1500", "save_every=1000"),
    *("evaluate.episodes=4", "evaluate.calibration_episodes=2"),
)
PPO = ("qat-control", "env=CartPole-v1", "algorithm=ppo", *TINY)
OFF_POLICY = (
    *(
        "qat-control",
        "env=Pendulum-v1",
        "algorithm=SAC",
        "timesteps=2400",
        "save_every=1000",
        "normalize=true",
    ),
    *("net_arch=[16]", "sb3.train_freq=4", "sb3.batch_size=16", "evaluate.episodes=2"),
)


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def scores(folder: Path) -> dict[tuple[str, str], list[float]]:
    return {(r["precision"], r["method"]): r["score"]["episodes"] for r in results(folder)["rows"]}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "quantized" / "policy.safetensors")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tensors to the bit; a grid's state holds plain flags, too."""
    return one.keys() == other.keys() and all(
        torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items()
    )


@pytest.fixture(scope="module")
def module_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny PPO run, once."""
    folder = tmp_path_factory.mktemp("qat") / "run"
    command = [sys.executable, "-m", "rlquant", "run", *PPO, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # no terminal, no progress
    return folder


def test_from_scratch_trains_compares_and_stores_packed_weights(module_run: Path) -> None:
    played = scores(module_run)
    assert list(played) == [("fp32", "none"), ("w4a8", "rtn"), ("w4a8", "qat")]
    assert {len(each) for each in played.values()} == {4}
    document = results(module_run)
    assert document["settings"]["config"]["timesteps"] == 1500
    assert document["training"]["quantized"]["timesteps"] == 1536  # whole rollouts of 2 x 128
    agent = load_artifact(module_run / "quantized")
    assert (agent.precision, agent.method, agent.algorithm) == ("w4a8", "qat", "PPO")
    codes = [t for name, t in tensors(module_run).items() if name.endswith("packed.codes")]
    assert [t.dtype for t in codes] == [torch.uint8] * 3
    assert sum(t.numel() for t in codes) == (4 * 64 + 64 * 64 + 64 * 2) // 2  # two codes a byte
    assert (module_run / "report.html").exists()
    assert not list((module_run / "checkpoints").glob("*/*"))


def test_the_reference_is_the_twin_and_the_artifact_names_it(
    module_run: Path, rlquant: Run, tmp_path: Path
) -> None:
    reference = load(module_run / "reference")
    assert reference.precision == "fp32"
    done = rlquant(
        "evaluate", module_run / "quantized", "--precisions", "fp32", "--episodes", 4, "--out", tmp_path
    )
    assert done.status == 0, done.err
    again = {(r["precision"], r["method"]): r["score"]["episodes"] for r in results(tmp_path)["rows"]}
    assert again[("w4a8", "qat")] == scores(module_run)[("w4a8", "qat")]
    assert again[("fp32", "none")] == scores(module_run)[("fp32", "none")]


def test_stock_sb3_plays_the_saved_model_as_the_artifact_scores(module_run: Path) -> None:
    env = make_vec_env("CartPole-v1", 1)
    model = sb3.PPO.load(module_run / "model.zip", device="cpu")
    returns = []
    for seed in range(4):
        env.seed(seed)
        returns.append(evaluate_policy(model, env, n_eval_episodes=1)[0])
    assert returns == scores(module_run)[("w4a8", "qat")]


@pytest.mark.slow
def test_a_finished_run_is_not_repeated_and_a_new_one_gives_the_same(
    module_run: Path, rlquant: Run, tmp_path: Path
) -> None:
    before = (module_run / "quantized" / "policy.safetensors").stat().st_mtime_ns
    assert rlquant("run", *PPO, "--out", module_run).status == 0
    assert (module_run / "quantized" / "policy.safetensors").stat().st_mtime_ns == before
    assert rlquant("run", *PPO, "--out", tmp_path / "new").status == 0
    assert same(tensors(tmp_path / "new"), tensors(module_run))
    assert scores(tmp_path / "new") == scores(module_run)
    assert rlquant("run", *PPO, "seed=1", "--out", tmp_path / "other").status == 0
    assert not same(tensors(tmp_path / "other"), tensors(module_run))


def test_fine_tuning_wins_back_what_rounding_loses(rlquant: Run, tmp_path: Path) -> None:
    options = (
        *("agent=ppo-cartpole", "scheme=w2a4", "timesteps=2048", "n_envs=8", "evaluate.episodes=10"),
        *("sb3.n_steps=64", "sb3.n_epochs=4", "sb3.gamma=0.98"),
    )
    assert rlquant("run", "qat-control", *options, "--out", tmp_path).status == 0
    mean = {key: np.mean(each) for key, each in scores(tmp_path).items()}
    assert mean[("fp32", "none")] == 500
    assert mean[("w2a4", "rtn")] < 150
    assert mean[("w2a4", "qat")] > 400
    assert not (tmp_path / "reference").exists()
    assert load_artifact(tmp_path / "quantized").origin == ("ppo-cartpole", load("ppo-cartpole").sha256)


@pytest.mark.slow
@pytest.mark.parametrize("command", [PPO, OFF_POLICY], ids=["PPO", "SAC"])
def test_a_killed_run_ends_with_the_same_bits(command: tuple[str, ...], rlquant: Run, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "rlquant", "run", *command, "--out", str(killed)],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and not list(killed.glob("checkpoints/*/quantized/step-*/state.json")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "quantized").exists()
    for folder in (killed, tmp_path / "whole"):
        assert rlquant("run", *command, "--out", folder).status == 0
    assert same(tensors(killed), tensors(tmp_path / "whole"))
    assert scores(killed) == scores(tmp_path / "whole")


class Killed(Exception):
    """Leaves a training without a word."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "env", "settings"),
    [
        (
            "PPO",
            "CartPole-v1",
            {"n_steps": 64, "n_epochs": 2, "learning_rate": "lin_0.001", "clip_range": "lin_0.2"},
        ),
        (
            "DQN",
            "CartPole-v1",
            {"train_freq": 8, "learning_starts": 300, "n_steps": 3, "exploration_fraction": 0.5},
        ),
        ("SAC", "Pendulum-v1", {"train_freq": 8, "batch_size": 16}),
    ],
)
@pytest.mark.parametrize("freeze_after", [None, 900])
def test_resuming_equals_going_on(
    algorithm: str, env: str, settings: dict[str, Any], freeze_after: int | None, tmp_path: Path
) -> None:
    start = find_start(algorithm, env, None)
    training = Training("t", 3500, 1000, 3, MixedScheme.parse("w4a8"), delay=1200, freeze_after=freeze_after)

    def make() -> Any:
        return new_model(
            start, SB3Settings(**settings), timesteps=3500, net_arch=[16], normalise=True, seed=3
        )

    def killed_at(step: int) -> Callable[[str, int, int], None]:
        def progress(_name: str, done: int, _wanted: int) -> None:
            if done >= step:
                raise Killed

        return progress

    whole = fit(make, training, tmp_path / "whole")
    for step in (700, 1700, 2900):  # before the swap, after it, and in the last segment but one
        with pytest.raises(Killed):
            fit(make, training, tmp_path / "killed", killed_at(step))
    resumed = fit(make, training, tmp_path / "killed")
    assert whole.num_timesteps == resumed.num_timesteps >= 3500
    assert whole.policy_class.frozen == resumed.policy_class.frozen == (freeze_after is not None)
    one, other = whole.policy.state_dict(), resumed.policy.state_dict()
    assert same(one, other)
    np.testing.assert_array_equal(
        whole.get_vec_normalize_env().obs_rms.mean, resumed.get_vec_normalize_env().obs_rms.mean
    )
    assert len(list((tmp_path / "killed").iterdir())) == 1  # the last checkpoint alone


def test_ctrl_c_keeps_what_was_trained(tmp_path: Path) -> None:
    start = find_start("ppo", "CartPole-v1", None)
    training = Training("t", 2000, 10_000, scheme=MixedScheme.parse("w4a8"))

    def make() -> Any:
        return new_model(start, SB3Settings(n_steps=64, n_epochs=1), timesteps=2000)

    def press(_name: str, done: int, _wanted: int) -> None:
        if done == 700:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(make, training, tmp_path, press)
    assert [path.name for path in tmp_path.iterdir()] == ["step-704"]
    seen: list[int] = []
    fit(make, training, tmp_path, lambda _name, done, _wanted: seen.append(done))
    assert seen[0] == 705


def test_a_whole_checkpoint_brings_its_critic_and_its_normaliser(tmp_path: Path) -> None:
    venv = VecNormalize(make_vec_env("Pendulum-v1", 1))
    model = sb3.TD3(
        "MlpPolicy", venv, policy_kwargs={"net_arch": [24, 8]}, learning_starts=50, device="cpu"
    ).learn(120)
    model.save(tmp_path / "agent.zip")
    venv.save(str(tmp_path / "vecnormalize.pkl"))
    given = AgentSettings(path=str(tmp_path / "agent.zip"), normaliser=tmp_path / "vecnormalize.pkl")
    begun = new_model(find_start(None, "Pendulum-v1", given), SB3Settings(), timesteps=1000, seed=9)
    assert same(begun.policy.state_dict(), model.policy.state_dict())
    normalise = begun.get_vec_normalize_env()
    shown = np.array([[0.3, -0.2, 4.0]], np.float32)
    np.testing.assert_allclose(normalise.normalize_obs(shown), venv.normalize_obs(shown))
    assert not normalise.training


@pytest.mark.parametrize("name", ["sac-pendulum", "dqn-cartpole", "cnn-catch"])
def test_a_shipped_agent_begins_as_it_acts(name: str) -> None:
    begun = new_model(find_start(None, None, AgentSettings(path=name)), SB3Settings(), timesteps=1000)
    stock = type(begun).load(catalog.agent_folder(name) / "agent.zip", device="cpu")
    begun.observation_space.seed(1)
    seen = np.stack([begun.observation_space.sample() for _ in range(50)])
    for one, other in zip(
        begun.predict(seen, deterministic=True), stock.predict(seen, deterministic=True), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    critic = getattr(begun.policy, "critic", None)
    assert critic is None or critic.q_networks[0][0].out_features == 64  # not the stump in the file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name env=CartPole-v1, or agent=ppo-cartpole"),
        (("env=CartPole-v9",), "CartPole-v9"),
        (("env=CartPole-v1", "algorithm=pppo"), "unknown algorithm 'pppo'. Did you mean 'ppo'?"),
        (("env=CartPole-v1", "scheme=w4a88"), "w4a88"),
        (("env=CartPole-v1", "scheme=fp8_e4m3"), "learns integer grids"),
        (("env=CartPole-v1", "algorithm=sac"), "SAC cannot train so in CartPole-v1"),
        (("env=CartPole-v1", "timesteps=2000"), "timesteps = 2000 are too few"),
        (("env=CartPole-v1", "sb3.n_step=64"), "unknown argument of PPO 'n_step'. Did you mean 'n_steps'?"),
        (("env=CartPole-v1", "sb3.learning_rate=lin_x"), "'lin_x' is no schedule"),
        (("env=CartPole-v1", "sb3.gamma=much"), "PPO cannot train so"),
        (("env=CartPole-v1", "timestep=5", "save_every=5"), "2 mistakes"),
        (("env=CartPole-v1", "evaluate.methods=[rtm]"), "rtm"),
        (("agent=ppo-cartpole", "algorithm=sac"), "ppo-cartpole is an agent of PPO, not of SAC"),
        (("agent=ppo-cartpole", "env=Pendulum-v1"), "fits this agent's spaces"),
        (("agent=ppo-cartpole", "net_arch=[8]"), "the agent brings its own"),
        (("agent=recurrentppo-cartpole",), "is an agent of RecurrentPPO, which cannot be trained quantized"),
        (("agent=ppo-cartpol",), "Did you mean the shipped agent 'ppo-cartpole'?"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: tuple[str, ...], message: str, rlquant: Run, tmp_path: Path
) -> None:
    done = rlquant("run", "qat-control", *options, "--out", tmp_path / "run")
    assert done.status == 2
    assert message in done.err
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_an_agent_that_changed_under_its_name_is_noticed(rlquant: Run, tmp_path: Path) -> None:
    for net in ([8], [9]):
        sb3.PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": net}, seed=0).save(
            tmp_path / "agent.zip"
        )
        options = (f"agent={tmp_path / 'agent.zip'}", "env=CartPole-v1", *TINY, "timesteps=600")
        done = rlquant("run", "qat-control", *options, "--out", tmp_path / "run")
    assert done.status == 2
    assert "the agent has changed" in done.err


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    start = find_start("ppo", "CartPole-v1", None)
    with pytest.raises(
        InputError, match=r"a checkpoint cannot be written: Not a directory; .* repeat the command"
    ):
        fit(
            lambda: new_model(start, SB3Settings(n_steps=64, n_epochs=1), timesteps=600),
            Training("t", 600, 1000),
            tmp_path / "file" / "t",
        )
