"""AWQ's checkpoint format GEMM, for weights of 4 bits.

Of a layer with K inputs, N outputs and G groups it holds

- ``qweight`` int32 ``[K, N / 8]``: codes of eight outputs in a word, interleaved as 0, 2, 4, 6, 1, 3, 5, 7;
- ``qzeros`` int32 ``[G, N / 8]``: zero points, packed the same way;
- ``scales`` float16 ``[G, N]``.

``W[n, k] = scales[k // group_size, n] * (q[k, n] - zero[k // group_size, n])``. A symmetric weight has the zero point
8 everywhere; the format does not say so, and what is read back is asymmetric, with the same values.

Source: Lin et al. 2023 (arXiv:2306.00978); AutoAWQ ``WQLinear_GEMM``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlquant.errors import InputError
from rlquant.llm.checkpoints.affine_linear import AffineLinear, half, int_scheme
from rlquant.llm.checkpoints.layout import declared, one_scheme, whole_groups
from rlquant.llm.checkpoints.shards import LayerTensors
from rlquant.llm.checkpoints.words import from_words, to_words
from rlquant.quant import Scheme

__all__ = ["AWQ"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AWQ:
    """See the module."""

    mark = "qweight"
    repeats_head = False

    def config(self, schemes: Mapping[str, Scheme], floats: Sequence[str], permuted: bool) -> dict[str, Any]:
        """``quantization_config``."""
        scheme = one_scheme(schemes, "AWQ")
        if scheme.weights.bits != 4:
            raise InputError(f"AWQ checkpoints hold 4 bits, not the {scheme.weights.bits} of {scheme.name}")
        if permuted:
            raise InputError("AWQ checkpoints have no place for GPTQ's act-order (desc_act): export to gptq")
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": scheme.granularity.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(floats) or None,
        }

    def to_tensors(self, stored: AffineLinear, name: str) -> dict[str, Tensor]:
        """``qweight``, ``qzeros`` and ``scales``."""
        rows, columns = stored.codes.shape
        whole_groups(stored.scheme, columns, name)
        if rows % 8:
            raise InputError(
                f"{name} has {rows} outputs; AWQ checkpoints pack them by eights: export to gptq"
            )
        return {
            "qweight": _interleaved(stored.codes.t()),
            "qzeros": _interleaved(stored.zero_point.t()),
            "scales": half(stored.scale, name).t(),
        }

    def from_tensors(
        self, config: Mapping[str, Any], tensors: LayerTensors, rows: int, columns: int
    ) -> AffineLinear:
        """Read GEMM."""
        bits = declared(config, "bits", int, default=config.get("w_bit"))
        size = declared(config, "group_size", int, default=config.get("q_group_size"))
        form = str(config.get("version") or config.get("format") or "gemm").lower()
        points = declared(config, "zero_point", bool, default=True)
        if bits != 4 or form != "gemm" or not points:
            raise InputError(
                f"an AWQ checkpoint of {bits} bits, version {form!r}, {'with' if points else 'without'} zero "
                "points is not read: 4 bits, version 'gemm', with zero points are"
            )
        scheme = int_scheme(4, None if size == -1 else size, symmetric=False)
        groups = scheme.granularity.scale_shape(rows, columns)[1]
        if rows % 8:
            raise InputError(f"{tensors.layer} has {rows} outputs; AWQ checkpoints pack them by eights")
        codes = tensors.take("qweight", (columns, rows // 8), torch.int32)
        zeros = tensors.take("qzeros", (groups, rows // 8), torch.int32)
        scales = tensors.take_scale("scales", (groups, rows))
        return AffineLinear(scheme, _straight(codes).t(), scales.t(), _straight(zeros).t())


def _interleaved(codes: Tensor) -> Tensor:
    """``[lines, n]`` -> int32 ``[lines, n / 8]``."""
    return to_words(codes.reshape(len(codes), -1, 8)[..., ORDER].flatten(1), 4)


def _straight(words: Tensor) -> Tensor:
    """``[lines, n / 8]`` -> codes ``[lines, n]``."""
    codes = from_words(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return torch.empty_like(codes).index_copy_(2, torch.tensor(ORDER), codes).flatten(1)
