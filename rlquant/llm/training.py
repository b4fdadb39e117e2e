"""What every fine-tuning run shares, whichever trainer it uses: arguments, checkpoints, Ctrl-C and memory that ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from rlquant.config import Section
from rlquant.errors import InputError, not_finite, unwritten_checkpoint
from rlquant.interrupts import CtrlC
from rlquant.llm.adapter_layer import named_as_peft_does
from rlquant.llm.adapters import (
    AdapterSettings,
    adapter_parameters,
    base_hash,
    lora_config,
)
from rlquant.llm.architecture import read_architecture
from rlquant.llm.backbone import BaseSettings
from rlquant.llm.cards import Card
from rlquant.llm.fitting import Knob, require_fit
from rlquant.llm.learning_rate import check_learning_rate
from rlquant.llm.loftq import init_loftq_
from rlquant.llm.memory import Workload, plan_memory
from rlquant.llm.model import LanguageModel
from rlquant.llm.precision import Precision
from rlquant.llm.progress import ShowProgress
from rlquant.llm.reporting import Report, check_report
from rlquant.runs import RunFolder

__all__ = ["ADAPTER", "TrainSettings", "adapted", "fit", "require_memory", "trainer_arguments"]

ADAPTER = "default"
"""The name that PEFT gives to a trainer's only adapter."""
_KNOBS: Mapping[Knob, str] = {"batch": "train.batch=", "seq": "data.max_length="}


class TrainSettings(Section):
    """How it is learned."""

    lr: float = Field(1e-5, gt=0, description="the learning rate at its height")
    epochs: float = Field(1.0, gt=0, description="passes through the data")
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    batch: int = Field(4, ge=1, description="rows that go through the model together")
    accumulate: int = Field(4, ge=1, description="batches for each step of the optimizer")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    optimizer: Literal["adamw", "paged_adamw_8bit"] = Field("adamw", description="the paged one needs a GPU")
    max_grad_norm: float = Field(1.0, gt=0)
    checkpointing: bool = Field(
        True, description="recompute activations: a third more work, much less memory"
    )
    save_every: int = Field(50, ge=1, description="steps from checkpoint to checkpoint")
    log_every: int = Field(10, ge=1)
    report: Report = "none"
    seed: int = 0

    def workload(
        self, task: str, *, seq: int, rank: int, completion: int | None = None, **rollouts: Any
    ) -> Workload:
        """What the planner is told of it, see :class:`~rlquant.llm.memory.Workload`."""
        step = self.batch * self.accumulate  # TRL generates for a whole step at once
        return Workload(
            task=task,
            batch=self.batch,
            seq=seq,
            completion=completion,
            rollout=step if completion else None,
            **rollouts,
            rank=rank,
            optimizer="adamw" if self.optimizer == "adamw" else "adamw8bit",
            checkpointing=self.checkpointing,
        )


def trainer_arguments(settings: TrainSettings, base: BaseSettings, run: RunFolder) -> dict[str, Any]:
    """Arguments of a trainer of transformers or TRL.

    Raises:
        InputError: the optimizer needs a GPU that is not there, or what reports is not installed.
    """
    device, dtype = base.on, base.computes_in
    if settings.optimizer == "paged_adamw_8bit" and device.type != "cuda":
        raise InputError("train.optimizer = 'paged_adamw_8bit' needs a CUDA device: take adamw")
    check_report(settings.report)
    return {
        "output_dir": str(run.checkpoints),
        "learning_rate": settings.lr,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.steps or -1,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulate,
        "warmup_steps": settings.warmup,  # a share, where it is below 1
        "lr_scheduler_type": settings.schedule,
        "optim": {"adamw": "adamw_torch"}.get(settings.optimizer, settings.optimizer),
        "max_grad_norm": settings.max_grad_norm,
        "gradient_checkpointing": settings.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_broadcast_buffers": False,  # which the packed weights are, the same in every process
        "bf16": dtype == "bf16",
        "fp16": dtype == "fp16",
        "use_cpu": device.type == "cpu",
        "save_strategy": "steps",
        "save_steps": settings.save_every,
        "save_total_limit": 2,
        "logging_steps": settings.log_every,
        "report_to": settings.report,
        "disable_tqdm": True,  # fit() shows how far it is
        "pad_to_multiple_of": 64
        if device.type == "cuda"
        else None,  # few shapes, so that kernels are chosen once
        "seed": settings.seed,
        "data_seed": settings.seed,
    }


def require_memory(base: BaseSettings, work: Workload, knobs: Mapping[Knob, str] = _KNOBS) -> None:
    """Refuse what cannot fit on the GPU, before anything loads; what the planner does not know is not refused.

    Args:
        base: the model.
        work: what is done with it.
        knobs: the settings of its sizes, as they are written.

    Raises:
        InputError: with the plan's numbers and the largest batch and length that fit.
    """
    if base.on.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(base.on)
    card = Card(properties.name, properties.total_memory, properties.major)
    try:
        model = read_architecture(base.source)
        precision = Precision.parse(base.precision, dtype=base.computes_in)
    except InputError:
        return
    require_fit(plan_memory(model, precision, work, card), card, knobs)


def adapted(
    trainer: type[Any],
    lm: LanguageModel,
    settings: AdapterSettings,
    *,
    weights: Callable[[], Mapping[str, Tensor]] | None = None,
    **arguments: Any,
) -> Any:
    """A trainer of TRL whose model is ``lm`` with a new adapter.

    The trainer puts the adapter on itself: given one, TRL would keep a second as the reference, which the base with
    adapters off is already. It does not see a quantized model, whose adapters it would round to bfloat16.

    Args:
        trainer: the class.
        lm: the base.
        settings: of the adapter.
        weights: gives the float weights that a LoftQ start needs; None where the base alone is the reference, which
            such a start would not be.
        arguments: of the trainer.

    Raises:
        InputError: a LoftQ start where there are no float weights.
    """
    if settings.init == "loftq" and weights is None:
        raise InputError(
            "adapters.init = 'loftq' starts elsewhere than the base, which is the reference of this recipe: take zero"
        )
    config = lora_config(lm.model, settings)
    with torch.random.fork_rng(devices=[]), named_as_peft_does(lm.model):
        made = trainer(model=lm.model, peft_config=config, processing_class=lm.tokenizer, **arguments)
    for parameter in adapter_parameters(made.model, ADAPTER).values():
        assert parameter.dtype == torch.float32
    if settings.init == "loftq" and weights is not None:
        init_loftq_(made.model, ADAPTER, weights())
    return made


def fit(trainer: Any, run: RunFolder, settings: TrainSettings, base: Any) -> dict[str, Any]:
    """Train, from the last whole checkpoint of the same settings where there is one.

    Args:
        trainer: of :func:`adapted`.
        run: where checkpoints lie.
        settings: of the training.
        base: the model that adapters were put on; it must not change.

    Returns:
        ``losses`` (step and loss of each log), ``base_sha256`` and ``seconds``.

    Raises:
        InputError: memory ran out (which knobs to turn), the disk is full, or the learning rate vanishes in the
            adapters' dtype.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
        SystemExit: in all processes but the first, where several trained together: it alone evaluates.
    """
    check_learning_rate(trainer.model, ADAPTER, settings.lr)
    before = base_hash(base)
    stop, clock = _StopAtCtrlC(), _Clock(run)
    trainer.remove_callback(PrinterCallback)
    for callback in (stop, clock, ShowProgress()):
        trainer.add_callback(callback)
    if not trainer.args.fp16:  # whose scaler leaves such steps out
        trainer.add_callback(_RefuseNaN())
    try:
        with stop.listening():
            trainer.train(resume_from_checkpoint=_last_checkpoint(run.checkpoints))
    except torch.OutOfMemoryError:
        raise InputError(_out_of_memory(settings, run.checkpoints)) from None
    except OSError as error:
        raise unwritten_checkpoint(error) from None
    if stop.asked:
        raise KeyboardInterrupt
    if base_hash(base) != before:
        raise RuntimeError("training changed the base, which must not happen")
    _go_on_alone(trainer)
    losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "base_sha256": before, "seconds": clock.seconds}


def _go_on_alone(trainer: Any) -> None:
    """Of processes that trained together, let the first go on and end the others."""
    if trainer.args.world_size == 1:
        return
    trainer.accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()  # of NCCL all have to
    if not trainer.is_world_process_zero():
        raise SystemExit(0)


class _StopAtCtrlC(TrainerCallback, CtrlC):
    """Ends the step at hand with a checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Of transformers' callbacks."""
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


class _Clock(TrainerCallback):
    """Seconds of training, those of earlier, interrupted runs included as far as their checkpoints."""

    def __init__(self, run: RunFolder) -> None:
        self._run, self._began = run, time.monotonic()
        self._before: float = (run.piece("seconds") or {"seconds": 0.0})["seconds"]

    @property
    def seconds(self) -> float:
        """Until now."""
        return self._before + time.monotonic() - self._began

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of transformers' callbacks."""
        self._run.save_piece("seconds", {"seconds": self.seconds})


class _RefuseNaN(TrainerCallback):
    """Ends a run whose gradients are no numbers, before the optimizer spreads them to every weight."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Of transformers' callbacks, as is the other."""
        self._trained = [each for each in model.parameters() if each.requires_grad]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the gradients."""
        gradients = [each.grad for each in self._trained if each.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise not_finite(state.global_step + 1)


def _last_checkpoint(folder: Path) -> str | None:
    """The last one that was written to its end: the trainer's state is written last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if path.stat().st_size]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def _out_of_memory(settings: TrainSettings, checkpoints: Path) -> str:
    ways = []
    if settings.batch > 1:
        half = settings.batch // 2
        ways.append(f"train.batch={half} train.accumulate={settings.accumulate * settings.batch // half}")
    if not settings.checkpointing:
        ways.append("train.checkpointing=true")
    if settings.optimizer == "adamw":
        ways.append("train.optimizer=paged_adamw_8bit")
    ways.append("a smaller data.max_length")
    last = _last_checkpoint(checkpoints)
    kept = f"; the last checkpoint is {last}" if last else ""
    return f"the GPU's memory ran out: try {', or '.join(ways)} ('rlquant memory' plans it){kept}"
