"""Activations on floats, by the names of their torch modules.

SciPy is imported where it is first needed: a policy that is only run seldom needs it, and waits for no import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ACTIVATIONS"]

Array = NDArray[Any]


def _expit(x: Array) -> Array:
    from scipy.special import expit

    logistic: Array = expit(x)
    return logistic


def _gelu(x: Array) -> Array:
    from scipy.special import erf

    share: Array = 0.5 * (1.0 + erf(x / np.sqrt(2.0)))
    return x * share


def _softplus(x: Array) -> Array:
    return np.logaddexp(x, 0.0)


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0.0)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "ReLU": lambda x: np.maximum(x, 0.0),
    "Tanh": np.tanh,
    "Sigmoid": _expit,
    "ELU": _elu,
    "LeakyReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "SiLU": lambda x: x * _expit(x),
    "GELU": _gelu,
    "SELU": lambda x: (
        1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0.0)))
    ),
    "Softplus": _softplus,
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "Softsign": lambda x: x / (1.0 + np.abs(x)),
    "Hardswish": lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "ReLU6": lambda x: np.clip(x, 0.0, 6.0),
}
"""From an array to one of its shape, computed in its dtype or in float64."""
