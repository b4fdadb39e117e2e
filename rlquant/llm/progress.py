"""How far a training run is: a bar on a terminal and lines elsewhere, with tokens/s, memory and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

__all__ = ["Progress", "ShowProgress"]

_SHOWN = ("loss", "reward", "kl", "rewards/accuracies")


class Progress:
    """Of one run, on stderr.

    Args:
        total: steps.
        done: steps that an earlier run has done.
        began: when this one began, by ``time.monotonic()``; by default now.

    Attributes:
        first: steps that were done before.
    """

    def __init__(self, total: int, done: int = 0, *, began: float | None = None) -> None:
        self.total, self.done, self.first = total, done, done
        self._began = time.monotonic() if began is None else began
        self._last = (self._began, 0.0)
        self._bar = tqdm(
            total=total, initial=done, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def advance(self) -> None:
        """One more step is done."""
        self.done += 1
        self._bar.update(1)

    def show(self, metrics: Mapping[str, float], tokens: float | None = None) -> None:
        """Show the metrics of the last step; ``tokens`` is how many there were in this run so far."""
        parts = [f"{name} {metrics[name]:.4g}" for name in _SHOWN if name in metrics]
        parts += self._speed(tokens)
        if torch.cuda.is_available():
            parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(parts))
            return
        parts.append(f"{self._left()} left")
        sys.stderr.write(f"step {self.done} of {self.total}: {', '.join(parts)}\n")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _speed(self, tokens: float | None) -> list[str]:
        """Tokens a second since they were last shown."""
        if tokens is None:
            return []
        now, (then, before) = time.monotonic(), self._last
        self._last = (now, tokens)
        return [f"{(tokens - before) / max(now - then, 1e-9):,.0f} tokens/s"]

    def _left(self) -> str:
        steps = max(self.done - self.first, 1)
        seconds = (time.monotonic() - self._began) / steps * (self.total - self.done)
        return str(tqdm.format_interval(seconds))


class ShowProgress(TrainerCallback):
    """:class:`Progress` of a trainer of transformers."""

    progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of transformers' callbacks, as are the others."""
        if state.is_world_process_zero:
            self.progress = Progress(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step more."""
        if self.progress is not None:
            self.progress.advance()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        """The metrics, but for the summary at the end."""
        if self.progress is not None and logs and "train_runtime" not in logs:
            self.progress.show(logs, logs.get("num_tokens"))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The bar ends."""
        if self.progress is not None:
            self.progress.close()
