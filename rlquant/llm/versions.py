"""A language model at other precisions, computed by the fastest kernels at hand."""

from __future__ import annotations

import copy
import sys

from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.load import DTYPES
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import BlockStore, Plan, quantize_model_
from rlquant.quant import get_method

__all__ = ["LLM_INT8", "accelerate_", "at_precision", "can_do", "plan_of"]

LLM_INT8 = "llm-int8"
"""The weights of ``int8`` multiplied by LLM.int8, see :mod:`~rlquant.llm.bitsandbytes`."""


def plan_of(precision: str, method: str = "rtn") -> Plan:
    """The plan that makes the weights of a precision. Raises InputError where it is unknown."""
    return Plan.parse("int8" if precision == LLM_INT8 else precision, method)


def can_do(precision: str, method: str) -> bool:
    """Whether a method can do a precision; LLM.int8 multiplies with plain weights, whose inputs are not rescaled."""
    plan, chosen = plan_of(precision), get_method(method)
    if precision == LLM_INT8 and chosen.transforms:
        return False
    try:
        for scheme in (plan.scheme, *plan.schemes.values()):
            chosen.check(scheme)
    except InputError:
        return False
    return True


def at_precision(
    lm: LanguageModel,
    precision: str,
    method: str = "rtn",
    *,
    calibration: Tensor | None = None,
    store: BlockStore | None = None,
) -> LanguageModel:
    """``lm`` at a dtype or under a plan; ``lm`` itself stays as it is, and is what is returned for its own precision.

    For ``llm-int8`` the result has the precision ``int8`` until :func:`accelerate_` makes the other of it.

    Raises:
        InputError: as :func:`~rlquant.llm.quantize.quantize_model_`.
    """
    if precision == lm.precision:
        return lm
    own = lm.but(model=copy.deepcopy(lm.model))
    if precision in DTYPES:
        own.model.to(DTYPES[precision])
        return own.but(precision=precision)
    return quantize_model_(own, plan_of(precision, method), calibration=calibration, store=store)


def accelerate_(lm: LanguageModel, dtype: str, precision: str) -> str:
    """Let kernels that read packed weights compute what they can, in place; the name of the runtime.

    Args:
        lm: from :func:`at_precision`.
        dtype: of the products.
        precision: as it was asked for.

    Raises:
        InputError: bitsandbytes has to compute this precision, and cannot.
    """
    from rlquant.llm.bitsandbytes import to_bitsandbytes_, to_llm_int8_

    if precision == LLM_INT8:
        to_llm_int8_(lm.model)
        return "bitsandbytes LLM.int8"
    if precision in DTYPES or lm.device.type != "cuda":
        return "torch"
    try:
        return "bitsandbytes" if to_bitsandbytes_(lm.model, DTYPES[dtype]) else "torch"
    except InputError as error:
        sys.stderr.write(f"rlquant: {error}; until then torch computes with dequantized weights\n")
        return "torch"
