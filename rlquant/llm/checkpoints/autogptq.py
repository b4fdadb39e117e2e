"""GPTQ checkpoints for AutoGPTQ 0.7.1, the last release of the library that the format comes from.

It differs from :mod:`~rlquant.llm.checkpoints.gptq` in what that library asks: it knows format v1 alone, so weights
are symmetric; and it ties an embedding to the output layer it has read, so an output layer that is left out of the
file leaves both zero. It is therefore written twice, as AutoGPTQ did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlquant.errors import InputError
from rlquant.llm.checkpoints.gptq import GPTQ
from rlquant.quant import Scheme

__all__ = ["AutoGPTQ"]


class AutoGPTQ(GPTQ):
    """See the module."""

    repeats_head = True

    def config(self, schemes: Mapping[str, Scheme], floats: Sequence[str], permuted: bool) -> dict[str, Any]:
        """``quantization_config`` of GPTQ. Raises InputError for asymmetric weights too."""
        config = super().config(schemes, floats, permuted)
        if not config["sym"]:
            raise InputError(
                "auto-gptq does not read zero points as GPTQModel stores them (gptq_v2): quantize without "
                "'-asym', or export to gptq"
            )
        return config
