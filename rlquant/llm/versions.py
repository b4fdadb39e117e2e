"""A language model at other precisions, computed by the fastest kernels at hand."""

from __future__ import annotations

import copy
import sys

from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.load import DTYPES
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import BlockStore, Plan, quantize_model_

__all__ = ["accelerate_", "at_precision"]


def at_precision(
    lm: LanguageModel,
    precision: str,
    method: str = "rtn",
    *,
    calibration: Tensor | None = None,
    store: BlockStore | None = None,
) -> LanguageModel:
    """``lm`` at a dtype or under a plan; ``lm`` itself stays as it is, and is what is returned for its own precision.

    Raises:
        InputError: as :func:`~rlquant.llm.quantize.quantize_model_`.
    """
    if precision == lm.precision:
        return lm
    own = lm.but(model=copy.deepcopy(lm.model))
    if precision in DTYPES:
        own.model.to(DTYPES[precision])
        return own.but(precision=precision)
    return quantize_model_(own, Plan.parse(precision, method), calibration=calibration, store=store)


def accelerate_(lm: LanguageModel, dtype: str) -> str:
    """Let kernels that read packed weights compute what they can, in place; the name of the runtime.

    Args:
        lm: at any precision.
        dtype: of the products.
    """
    if lm.precision in DTYPES or lm.device.type != "cuda":
        return "torch"
    from rlquant.llm.bitsandbytes import to_bitsandbytes_

    try:
        return "bitsandbytes" if to_bitsandbytes_(lm.model, DTYPES[dtype]) else "torch"
    except InputError as error:
        sys.stderr.write(f"rlquant: {error}; until then torch computes with dequantized weights\n")
        return "torch"
