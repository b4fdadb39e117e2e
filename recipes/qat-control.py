"""Quantization-aware training of a control policy in stock Stable-Baselines3.

    rlquant run qat-control env=CartPole-v1 scheme=w4a8 algorithm=ppo timesteps=50000
    rlquant run qat-control agent=ppo-cartpole scheme=w2a4 timesteps=4096 n_envs=8 sb3.n_steps=64
    rlquant run qat-control-sac

From scratch, or fine-tuning a trained agent (a shipped one, an SB3 zip with env=..., an rl-zoo folder). The policy
trains in float for a while, then quantized: in rollouts and in the loss (LSQ; see rlquant/control/qat_sb3.py). A critic
that the agent's file lacks, as the shipped ones do, is learned anew; optimizers always begin anew.

In the end the policy, as it is deployed, plays the same episodes as a float reference - the given agent, or from
scratch a twin that is trained alike in float - and as the reference rounded after training. Their seeds are never
those of training or calibration. The run's folder holds quantized/ (the artifact), model.zip (SB3's, to go on with),
reference/ (the twin), results.json and report.html.

A killed run goes on from its last checkpoint and ends with the same policy, to the bit: SB3's model, replay buffer and
normaliser are saved, and what SB3 cannot save (the environments' state, random generators) begins anew at every
checkpoint of every run. A rollout cut short is played again. Ctrl-C saves, too, but between two such checkpoints: a run
that goes on from there ends well, but not at the same bits. Finished trainings and episodes are not repeated.
"""

import shutil
import time
from dataclasses import replace
from functools import partial

from pydantic import Field

from rlquant.commands import progress_bar, publish
from rlquant.config import Section
from rlquant.control import Agent, Evaluation, Settings, from_sb3, load_artifact, save_artifact
from rlquant.control.evaluate import subject
from rlquant.control.qat_sb3 import quantized_agent
from rlquant.control.sb3_start import AgentSettings, SB3Settings, Start, find_start, new_model
from rlquant.control.sb3_training import Training, check_training, fit
from rlquant.control.settings import settings_json
from rlquant.devices import device_named
from rlquant.errors import InputError
from rlquant.measure import results_document
from rlquant.quant import MixedScheme
from rlquant.runs import RunFolder, machine_info, package_versions


class EvaluationSettings(Section):
    """The evaluation at the end; see ``rlquant evaluate --help``."""

    methods: tuple[str, ...] = Field(("rtn",), description="how the reference is rounded, to compare with")
    episodes: int = Field(100, ge=1)
    seed: int = Field(0, ge=0, description="of the first episode")
    margin: float = Field(0.02, ge=0, lt=1, description="share of the reward that may be lost")
    calibration_episodes: int = Field(8, ge=1)


class Config(Section):
    """Settings of this recipe."""

    env: str | None = Field(None, description="id; by default the agent's")
    agent: AgentSettings | None = Field(None, description="fine-tune this one; None trains from scratch")
    algorithm: str | None = Field(None, description="ppo, sac, ...; by default the agent's, or ppo")
    scheme: str = Field("w4a8", description="integer weights, and activations; see rlquant ls schemes")
    timesteps: int = Field(50_000, ge=1, description="environment steps, all environments together")
    delay: int | None = Field(
        None, ge=0, description="steps in float; None: a tenth, 0 where an agent is given"
    )
    freeze_after: int | None = Field(
        None, ge=0, description="quantized steps until the grids stay; None: never"
    )
    n_envs: int = Field(1, ge=1, le=1000, description="environments stepped together")
    normalize: bool = Field(
        False, description="observations and rewards, by running statistics (VecNormalize)"
    )
    net_arch: list[int] | None = Field(None, description="hidden layers; None for SB3's")
    sb3: SB3Settings = SB3Settings()
    seed: int = Field(0, ge=0)
    save_every: int = Field(10_000, ge=1000, description="steps from checkpoint to checkpoint")
    device: str = "cpu"
    evaluate: EvaluationSettings = EvaluationSettings()


def main(config: Config, run: RunFolder) -> None:
    """Train, compare, publish."""
    scheme, settings = MixedScheme.parse(config.scheme), evaluation_settings(config)
    start = find_start(config.algorithm, config.env, config.agent)
    require_same_agent(run, start)
    make = partial(
        new_model, start, config.sb3, timesteps=config.timesteps, n_envs=config.n_envs, net_arch=config.net_arch,
        normalise=config.normalize, seed=config.seed, device=device_named(config.device),
    )  # fmt: skip
    plan = training(config, scheme)
    check_training(make(), plan)
    reference = start.agent or trained(run, make, replace(plan, name="reference", scheme=None), start)
    quantized = trained(run, make, plan, start, reference)
    with progress_bar("episodes") as progress:
        measured = Evaluation(reference, settings, artifact=quantized, pieces=run, progress=progress).run()
    document = results_document(
        subject=subject(reference),
        settings={**settings_json(settings), "config": config.model_dump(mode="json")},
        machine=machine_info(config.device),
        versions=package_versions(),
        reference=measured["reference"],
        rows=measured["rows"],
    )
    document["training"] = {name: run.piece(f"trained-{name}") for name in ("reference", "quantized")}
    publish(run, document)
    shutil.rmtree(run.checkpoints, ignore_errors=True)


def training(config: Config, scheme: MixedScheme) -> Training:
    """How the quantized policy is trained."""
    tenth = 0 if config.agent else config.timesteps // 10
    delay = tenth if config.delay is None else config.delay
    return Training(
        "quantized", config.timesteps, config.save_every, config.seed, scheme, delay, config.freeze_after
    )


def evaluation_settings(config: Config) -> Settings:
    """The same checks as ``rlquant evaluate`` makes, before anything is trained."""
    given = config.evaluate.model_dump()
    settings = Settings(precisions=(config.scheme,) if config.evaluate.methods else (), **given)
    settings.schemes()
    return settings


def require_same_agent(run: RunFolder, start: Start) -> None:
    """An agent's file may change under its name; a run goes on with the one that it began with."""
    sha256 = start.agent.sha256 if start.agent else ""
    begun = run.piece("agent")
    if begun is not None and begun["sha256"] != sha256:
        raise InputError(
            f"the agent has changed since {run.path} was begun: choose another folder with --out"
        )
    run.save_piece("agent", {"sha256": sha256})


def trained(
    run: RunFolder, make: partial, plan: Training, start: Start, origin: Agent | None = None
) -> Agent:
    """What a training ends with, as an artifact's agent; trained unless that is done.

    Args:
        run: its folder.
        make: the model before its first step.
        plan: the training; its name is the artifact's.
        start: where it plays.
        origin: the agent that the artifact names as its reference.
    """
    done, folder = run.piece(f"trained-{plan.name}"), run.path / plan.name
    if done is None:
        began = time.monotonic()
        with progress_bar("steps") as progress:
            model = fit(make, plan, run.checkpoints / plan.name, progress)
        agent = (quantized_agent if plan.scheme else from_sb3)(model, env=start.env)
        if origin is not None:
            agent = replace(agent, source=origin.source, sha256=origin.sha256)
            model.save(run.path / "model.zip")
        save_artifact(agent, folder)
        steps = {"timesteps": model.num_timesteps, "seconds": round(time.monotonic() - began, 1)}
        run.save_piece(f"trained-{plan.name}", steps)
    return load_artifact(folder)
