"""From an adapter to a model without one: added to the float weights, then quantized for deployment.

A small change does not survive being added to 4-bit codes, and merging again and again drifts. So the adapter is added
to float weights, the dequantized ones that it was trained on or the original ones, and these are quantized anew, with
calibration on what the run learned from. On the dequantized ones the float model is the tuned one; the original ones
have no errors of the first quantization, but the adapter has learned to live with those.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rlquant.config import Section
from rlquant.errors import missing_package
from rlquant.llm.backbone import BaseSettings
from rlquant.llm.load import DTYPES, load
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.quant import QuantLinear

__all__ = ["MergeSettings", "deployed", "merged"]


class MergeSettings(Section):
    """What becomes of the adapter."""

    onto: Literal["original", "dequantized"] = Field(
        "dequantized",
        description="float weights that it is added to: those of the base that it saw, or the original",
    )
    precisions: tuple[str, ...] = Field(
        ("int4-g128",), description="of the merged model, each with every method"
    )
    methods: tuple[str, ...] = Field(("gptq",), description="rtn, gptq, awq, ...")
    windows: int = Field(64, ge=1, description="of the run's own data for calibration")
    length: int = Field(512, ge=8, description="tokens of each window")


def merged(base: BaseSettings, adapter: Path, onto: Literal["original", "dequantized"]) -> LanguageModel:
    """The float model with an adapter added to its weights, on the CPU, in the dtype of the base's products.

    Args:
        base: what the adapter was trained on.
        adapter: a folder as PEFT writes it.
        onto: the original weights, or the dequantized ones that the adapter saw.

    Raises:
        InputError: the base cannot be loaded, or peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise missing_package("peft", "llm", "merging adapters") from None
    lm = load(base.source, dtype="fp32", trust=base.trust)
    if onto == "dequantized" and base.precision not in DTYPES:
        lm = quantize_model_(lm, Plan.parse(base.precision), device=base.on)
        dequantize_(lm.model)
    model = PeftModel.from_pretrained(lm.model, str(adapter)).merge_and_unload()
    dtype = base.computes_in
    return lm.but(model=model.to(DTYPES[dtype]).eval(), precision=dtype, method="none")


def dequantize_(model: nn.Module) -> None:
    """Turn packed linear layers into float ones with the same values, in place."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, QuantLinear):
                setattr(parent, name, _dense(layer))


def deployed(
    lm: LanguageModel,
    precision: str,
    method: str,
    calibration: Callable[[], Tensor],
    device: torch.device,
) -> LanguageModel:
    """A merged model quantized for deployment, in place, on ``device``; ``calibration`` is asked where it is needed.

    Raises:
        InputError: as :func:`~rlquant.llm.quantize.quantize_model_`.
    """
    plan = Plan.parse(precision, method)
    made = quantize_model_(
        lm, plan, calibration=calibration() if plan.needs_calibration else None, device=device
    )
    made.model.to(device)
    return made


def _dense(layer: Any) -> nn.Linear:
    weight = layer.packed.dequantize()
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    return dense
