"""Ctrl-C during a long run: the step at hand ends with a checkpoint, a second one ends everything."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["CtrlC"]


class CtrlC:
    """Remembers that Ctrl-C was pressed.

    Attributes:
        asked: whether it was, while :meth:`listening`.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the signal for a while. The second Ctrl-C raises KeyboardInterrupt at once."""
        before = signal.getsignal(signal.SIGINT)

        def ask(*_: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            sys.stderr.write(
                "\nrlquant: stopping after this step, with a checkpoint; again to stop at once\n"
            )

        try:
            signal.signal(signal.SIGINT, ask)
        except ValueError:  # not in the main thread, where no Ctrl-C arrives
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
