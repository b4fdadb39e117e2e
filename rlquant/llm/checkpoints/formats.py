"""The checkpoint formats by name: what ``quant_method`` of config.json says, and what can be written besides."""

from __future__ import annotations

from rlquant.llm.checkpoints.autogptq import AutoGPTQ
from rlquant.llm.checkpoints.awq import AWQ
from rlquant.llm.checkpoints.compressed import CompressedTensors
from rlquant.llm.checkpoints.gptq import GPTQ
from rlquant.llm.checkpoints.layout import Layout

__all__ = ["FORMATS"]

FORMATS: dict[str, Layout] = {
    "gptq": GPTQ(),
    "autogptq": AutoGPTQ(),
    "awq": AWQ(),
    "compressed-tensors": CompressedTensors(),
}
