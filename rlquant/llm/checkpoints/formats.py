"""The checkpoint formats by the name that ``quant_method`` of config.json gives them."""

from __future__ import annotations

from rlquant.llm.checkpoints.awq import AWQ
from rlquant.llm.checkpoints.compressed import CompressedTensors
from rlquant.llm.checkpoints.gptq import GPTQ
from rlquant.llm.checkpoints.layout import Layout

__all__ = ["FORMATS"]

FORMATS: dict[str, Layout] = {"gptq": GPTQ(), "awq": AWQ(), "compressed-tensors": CompressedTensors()}
