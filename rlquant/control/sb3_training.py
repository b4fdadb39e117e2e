"""Trains a Stable-Baselines3 model so that a killed training goes on, and ends as if it had not been killed.

SB3 saves its model, replay buffer and normaliser, but no environment and no random state. So a training goes from
checkpoint to checkpoint in segments, and each begins anew in what SB3 cannot save: the environments are reset and
all generators seeded, by the seed and the step. Killed or not, a training passes the same such beginnings. The
episodes under way at a checkpoint are cut there, as at the end of a rollout: bootstrapped by the critic, never
counted as terminated. A rollout buffer is never saved, since a segment ends between two rollouts.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from rlquant.control.qat_sb3 import QuantizationCallback
from rlquant.errors import InputError, unwritten_checkpoint
from rlquant.interrupts import CtrlC
from rlquant.measure import single_thread
from rlquant.quant import MixedScheme

__all__ = ["TRAINING_SEED", "Training", "check_training", "fit"]

TRAINING_SEED = 2_000_000_000
"""Environments are reset with seeds from here on: never those of episodes that score or calibrate a policy."""

_ENOUGH = 256  # observations before a QuantizationCallback chooses ranges


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        name: for the progress bar.
        timesteps: environment steps in all.
        save_every: steps from checkpoint to checkpoint, at least 1,000; they decide where episodes are cut.
        seed: of environments, exploration and batches.
        scheme: what it is trained to; None trains in float.
        delay, freeze_after: as for :class:`~rlquant.control.qat_sb3.QuantizationCallback`.
    """

    name: str
    timesteps: int
    save_every: int
    seed: int = 0
    scheme: MixedScheme | None = None
    delay: int = 0
    freeze_after: int | None = None

    def callback(self, at: int, swapped_at: int | None) -> QuantizationCallback | None:
        """For the segment that begins at step ``at``; one callback counts from where its segment begins."""
        if self.scheme is None:
            return None
        freeze = self.freeze_after
        if freeze is not None and swapped_at is not None:
            freeze = max(0, swapped_at + freeze - at)
        return QuantizationCallback(self.scheme, delay=self.delay, freeze_after=freeze)


def check_training(model: Any, training: Training) -> None:
    """Raise InputError where the model cannot be trained so, or not in so few steps; changes nothing."""
    callback = training.callback(0, None)
    if callback is None:
        return
    callback.init_callback(model)
    rollout = model.n_envs * (
        model.n_steps if isinstance(model, OnPolicyAlgorithm) else model.train_freq.frequency
    )
    waits = max(training.delay, _ENOUGH, getattr(model, "learning_starts", 0))
    swap = -(-waits // rollout) * rollout
    if training.timesteps <= swap:
        raise InputError(
            f"timesteps = {training.timesteps} are too few: the policy trains in float up to step {swap} (delay "
            f"{training.delay}, rollouts of {rollout} steps), and quantized from there; set timesteps={4 * swap}, or "
            "a smaller delay or rollout"
        )


def fit(
    make: Callable[[], Any],
    training: Training,
    checkpoints: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """Train, from the last checkpoint where there is one.

    Args:
        make: the model before its first step, with its environments.
        training: how.
        checkpoints: of exactly this training; the folder keeps the last one.
        progress: called with name, steps done, steps wanted.

    Returns:
        The trained SB3 model.

    Raises:
        InputError: a checkpoint cannot be written (a full disk); the one before is kept.
        KeyboardInterrupt: Ctrl-C, after a checkpoint. What goes on from it cuts episodes at other steps than an
            undisturbed training; after a kill, nothing differs.
    """
    ctrl_c = CtrlC()
    # The first weights and the order of sums depend on the threads, and small networks gain nothing from more.
    with single_thread():
        model, swapped_at = _restored(make(), checkpoints)
        try:
            with ctrl_c.listening():
                while model.num_timesteps < training.timesteps and not ctrl_c.asked:
                    swapped_at = _segment(model, training, swapped_at, ctrl_c, progress)
                    _save(model, checkpoints, swapped_at)
        except OSError as error:
            raise unwritten_checkpoint(error) from None
    if ctrl_c.asked:
        raise KeyboardInterrupt
    return model


class _Boundary(Exception):
    """Leaves ``learn`` between two rollouts; SB3 offers no other way that leaves nothing half done."""


class _Watch(BaseCallback):
    """Ends a segment, and tells the progress."""

    def __init__(
        self, training: Training, until: int, ctrl_c: CtrlC, progress: Callable[[str, int, int], None] | None
    ) -> None:
        super().__init__()
        self.training, self.until, self.ctrl_c, self.progress = training, until, ctrl_c, progress

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        begun = steps > self.model._num_timesteps_at_start
        if steps >= self.until or (self.ctrl_c.asked and begun):
            raise _Boundary

    def _on_step(self) -> bool:
        if self.progress is not None:
            total = self.training.timesteps
            self.progress(self.training.name, min(self.num_timesteps, total), total)
        return True


def _segment(
    model: Any,
    training: Training,
    swapped_at: int | None,
    ctrl_c: CtrlC,
    progress: Callable[[str, int, int], None] | None,
) -> int | None:
    """Train to the next checkpoint; the step at which the policy was quantized, None where it was not."""
    at = model.num_timesteps
    _begin_anew(model, training.seed)
    quantization = training.callback(at, swapped_at)
    watch = _Watch(training, at + training.save_every, ctrl_c, progress)
    try:
        # In this order: what is due at the boundary happens before the checkpoint.
        callbacks = CallbackList([each for each in (quantization, watch) if each is not None])
        model.learn(training.timesteps - at, callback=callbacks, reset_num_timesteps=False)
    except _Boundary:
        pass
    return swapped_at if swapped_at is not None or quantization is None else quantization.swapped_at


def _begin_anew(model: Any, seed: int) -> None:
    """Seed everything and let ``learn`` reset the environments."""
    drawn = int(np.random.SeedSequence([seed, model.num_timesteps]).generate_state(1)[0])
    model.set_random_seed(TRAINING_SEED + drawn % TRAINING_SEED)
    model._last_obs = None
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None and buffer.size():
        buffer.timeouts[buffer.pos - 1] = 1.0  # returns of several steps end where the episode was cut


def _save(model: Any, folder: Path, swapped_at: int | None) -> None:
    """Write a checkpoint, whole or not at all, and remove those before it."""
    temporary = folder / f".step-{model.num_timesteps}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        model.save(temporary / "model.zip")
        if getattr(model, "replay_buffer", None) is not None:
            model.save_replay_buffer(temporary / "replay.pkl")
        normalise = model.get_vec_normalize_env()
        if normalise is not None:
            normalise.save(str(temporary / "normalise.pkl"))
        (temporary / "state.json").write_text(json.dumps({"swapped_at": swapped_at}))
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        whole = folder / temporary.name.removeprefix(".")
        shutil.rmtree(whole, ignore_errors=True)
        temporary.replace(whole)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for older in folder.glob("step-*"):
        if older != whole:
            shutil.rmtree(older, ignore_errors=True)


def _restored(model: Any, folder: Path) -> tuple[Any, int | None]:
    """The model of the last checkpoint in the environments of the new one; the new one where there is none.

    Checkpoints are pickles, of our own making: SB3 has no other form for what training needs.
    """
    saved = sorted(folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))
    if not saved:
        return model, None
    newest = saved[-1]
    _restore_statistics(model.get_vec_normalize_env(), newest / "normalise.pkl")
    with warnings.catch_warnings():
        # SB3 takes the buffer class that it chose itself for one of ours; the buffer is restored below.
        warnings.filterwarnings("ignore", message="`n_steps=")
        restored = type(model).load(newest / "model.zip", env=model.get_env(), device=model.device)
    if (newest / "replay.pkl").exists():
        restored.load_replay_buffer(newest / "replay.pkl")
    return restored, json.loads((newest / "state.json").read_text())["swapped_at"]


def _restore_statistics(normalise: VecNormalize | None, path: Path) -> None:
    if normalise is not None:
        saved = VecNormalize.load(str(path), normalise.venv)
        normalise.obs_rms, normalise.ret_rms = saved.obs_rms, saved.ret_rms
