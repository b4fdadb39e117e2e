"""Errors that a user can act on.

This module is a leaf: it imports the standard library alone, so that every part of the library may raise
these errors without loading anything else. The CLI prints an :class:`InputError` as one sentence and exits
with status 2; every other exception is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "missing_package", "nearest", "unknown_name", "unwritten_checkpoint"]


class InputError(ValueError):
    """What the user gave cannot be used. The message names the value, the choices and the way out."""


def nearest(value: str, choices: Iterable[str]) -> str | None:
    """The choice most similar to ``value``, or None where nothing is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(value.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[match[0]] if match else None


def unknown_name(kind: str, value: str, choices: Iterable[str]) -> InputError:
    """An error for a name that is not among ``choices``; suggests the nearest and lists them all."""
    known = list(choices)
    close = nearest(value, known)
    hint = f" Did you mean {close!r}?" if close else ""
    return InputError(f"unknown {kind} {value!r}.{hint} Choices: {', '.join(known)}.")


def missing_package(package: str, extra: str, needed_for: str) -> InputError:
    """An error for an optional package that is not installed; gives the exact pip command."""
    return InputError(f'{needed_for} needs the package {package}: pip install "rlquant[{extra}]"')


def not_finite(step: int) -> InputError:
    """An error for gradients that are NaN or infinite; the checkpoint before them is sound."""
    return InputError(
        f"the gradients of step {step} are no finite numbers, which ended the run: a smaller learning rate, or another "
        "precision or dtype of the model may help; the last checkpoint is from before that"
    )


def unwritten_checkpoint(error: OSError) -> InputError:
    """An error for a checkpoint that could not be written; the one before it is whole."""
    return InputError(
        f"a checkpoint cannot be written: {error.strerror or error}; free some space, then repeat the command: it goes "
        "on after the last whole checkpoint"
    )
