"""A run of PPO in its folder: checkpoints, what is shown of it, Ctrl-C and memory that ends."""

from __future__ import annotations

import time
from typing import Any

import torch

from rlquant.errors import InputError
from rlquant.interrupts import CtrlC
from rlquant.llm.ppo import PPO
from rlquant.llm.progress import Progress
from rlquant.llm.reporting import Report, tracker
from rlquant.runs import RunFolder

__all__ = ["run_ppo"]


def run_ppo(ppo: PPO, run: RunFolder, *, every: int, report: Report = "none") -> dict[str, Any]:
    """Run PPO to its end, from its checkpoint where there is one.

    Args:
        ppo: the run.
        run: where its checkpoint lies.
        every: steps from checkpoint to checkpoint.
        report: where the metrics of each step go, besides the results.

    Returns:
        ``losses`` (step and policy loss), ``metrics`` of each step, ``base_sha256`` and ``seconds``.

    Raises:
        InputError: as :meth:`~rlquant.llm.ppo.PPO.run`; memory ran out.
        KeyboardInterrupt: Ctrl-C, after a checkpoint was saved.
    """
    stop, log = CtrlC(), _Log(ppo, run, report)
    checkpoint = run.checkpoints.with_suffix(".safetensors")
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    try:
        with stop.listening():
            ppo.run(checkpoint=checkpoint, every=every, progress=log.note, stop=lambda: stop.asked)
    except torch.OutOfMemoryError:
        raise InputError(
            "the GPU's memory ran out: set ppo.microbatch=1, a smaller ppo.minibatch, or a smaller ppo.max_new_tokens"
        ) from None
    finally:
        log.close()
    if stop.asked and ppo.step < ppo.settings.steps:
        raise KeyboardInterrupt
    return {
        "losses": [[number, each["policy_loss"]] for number, each in enumerate(log.metrics, 1)],
        "metrics": log.metrics,
        "base_sha256": ppo.roles.base_hash(),
        "seconds": log.seconds,
    }


class _Log:
    """Metrics of every step, kept in the run's folder, reported and shown.

    Attributes:
        metrics: of each step, those of earlier, interrupted runs included.
        seconds: of all of them.
    """

    def __init__(self, ppo: PPO, run: RunFolder, report: Report) -> None:
        kept = run.piece("metrics") or {"steps": [], "seconds": 0.0}
        self.metrics: list[dict[str, float]] = kept["steps"]
        self.seconds: float = kept["seconds"]
        self._run, self._settings, self._report = run, ppo.settings, tracker(report, run.path)
        self._began, self._last = time.monotonic(), time.monotonic()
        self._progress: Progress | None = None

    def note(self, step: int, found: dict[str, float]) -> None:
        """After each step."""
        del self.metrics[step - 1 :]  # what came after the checkpoint comes again
        self.metrics.append(found)
        now = time.monotonic()
        self.seconds, self._last = self.seconds + now - self._last, now
        self._run.save_piece("metrics", {"steps": self.metrics, "seconds": self.seconds})
        if self._report is not None:
            self._report.log(found, step=step)
        if self._progress is None:
            self._progress = Progress(self._settings.steps, step - 1, began=self._began)
        self._progress.advance()
        lengths = [each["length"] for each in self.metrics[self._progress.first :]]
        self._progress.show(found, self._settings.batch * sum(lengths))

    def close(self) -> None:
        """Let go of the terminal and the report."""
        if self._progress is not None:
            self._progress.close()
        if self._report is not None:
            self._report.finish()
