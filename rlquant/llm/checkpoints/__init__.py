"""Quantized checkpoints in the formats of other libraries: GPTQ, AWQ and compressed-tensors."""

from rlquant.llm.checkpoints.formats import FORMATS
from rlquant.llm.checkpoints.read import read_checkpoint
from rlquant.llm.checkpoints.write import write_checkpoint

__all__ = ["FORMATS", "read_checkpoint", "write_checkpoint"]
