"""The checkpoint format of AutoGPTQ and GPTQModel, for weights of 2, 3, 4 or 8 bits.

Of a layer with K inputs, N outputs and G groups it holds

- ``qweight`` int32 ``[K * bits / 32, N]``: codes, those of one output lying along the first dimension;
- ``qzeros`` int32 ``[G, N * bits / 32]``: zero points; 2**(bits - 1) in symmetric checkpoints;
- ``scales`` float16 ``[G, N]`` and ``g_idx`` int32 ``[K]``, the group of each input.

``W[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n])``. Format v1, ``gptq``, stores zero points minus one,
which a zero point of 0 breaks: its field wraps, and readers do not agree on what follows. So symmetric weights are
written as v1, which all read, and asymmetric ones as ``gptq_v2``, which stores zero points as they are and AutoGPTQ
does not know.

Source: Frantar et al. 2022 (arXiv:2210.17323); AutoGPTQ 0.7.1 ``qlinear_cuda_old.py``, GPTQModel 7.7
``convert_gptq_v1_to_v2_format``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlquant import __version__
from rlquant.errors import InputError
from rlquant.llm.checkpoints.affine_linear import AffineLinear, half, int_scheme
from rlquant.llm.checkpoints.layout import declared, one_scheme, whole_groups
from rlquant.llm.checkpoints.permuted import group_order
from rlquant.llm.checkpoints.shards import LayerTensors
from rlquant.llm.checkpoints.words import from_words, to_words
from rlquant.quant import Scheme

__all__ = ["GPTQ"]

BITS = (2, 3, 4, 8)
V1, V2 = "gptq", "gptq_v2"


class GPTQ:
    """See the module."""

    mark = "qweight"
    repeats_head = False

    def config(self, schemes: Mapping[str, Scheme], floats: Sequence[str], permuted: bool) -> dict[str, Any]:
        """``quantization_config``; ``quantize_config.json`` of AutoGPTQ says the same."""
        scheme = one_scheme(schemes, "GPTQ")
        if scheme.weights.bits not in BITS:
            raise InputError(
                f"GPTQ checkpoints hold 2, 3, 4 or 8 bits, not the {scheme.weights.bits} of {scheme.name}"
            )
        if floats:
            raise InputError(
                f"GPTQ checkpoints quantize every linear layer of the blocks, but {floats[0]} is a float: "
                "export to compressed-tensors or awq"
            )
        form = V1 if scheme.symmetric else V2
        return {
            "quant_method": "gptq",
            "bits": scheme.weights.bits,
            "group_size": scheme.granularity.group_size or -1,
            "desc_act": permuted,
            "static_groups": permuted,
            "sym": scheme.symmetric,
            "true_sequential": True,
            "damp_percent": 0.01,
            "lm_head": False,
            "checkpoint_format": form,
            "model_file_base_name": "model",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"rlquant:{__version__}"]},
        }

    def to_tensors(self, stored: AffineLinear, name: str) -> dict[str, Tensor]:
        """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
        rows, columns = stored.codes.shape
        whole_groups(stored.scheme, columns, name)
        for count, what in ((rows, "outputs"), (columns, "inputs")):
            if count * stored.bits % 32:
                raise InputError(
                    f"{name} has {count} {what}, which do not fill 32-bit words at {stored.bits} bits: export "
                    "to compressed-tensors"
                )
        groups = torch.arange(columns, dtype=torch.int32) // (stored.group_size or columns)
        codes, g_idx = stored.codes, groups
        if stored.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, stored.order, codes)
            g_idx = torch.empty_like(groups).index_copy_(0, stored.order.cpu(), groups)
        zeros = stored.zero_point - 1 if stored.scheme.symmetric else stored.zero_point
        return {
            "qweight": to_words(codes, stored.bits).t(),
            "qzeros": to_words(zeros.t(), stored.bits),
            "scales": half(stored.scale, name).t(),
            "g_idx": g_idx,
        }

    def from_tensors(
        self, config: Mapping[str, Any], tensors: LayerTensors, rows: int, columns: int
    ) -> AffineLinear:
        """Read v1 or v2, act-order or not."""
        bits, size = declared(config, "bits", int), declared(config, "group_size", int)
        form = config.get("checkpoint_format") or V1
        if bits not in BITS or form not in (V1, V2):
            raise InputError(
                f"a GPTQ checkpoint of {bits} bits in the form {form!r} is not read; these are: bits "
                f"{', '.join(map(str, BITS))} in {V1!r} or {V2!r}"
            )
        scheme = int_scheme(
            bits, None if size == -1 else size, symmetric=declared(config, "sym", bool, default=True)
        )
        groups = scheme.granularity.scale_shape(rows, columns)[1]
        words = -(-columns * bits // 32), -(-rows * bits // 32)
        codes = tensors.take("qweight", (words[0], rows), torch.int32)
        zeros = tensors.take("qzeros", (groups, words[1]), torch.int32)
        scales = tensors.take_scale("scales", (groups, rows))
        points = _zero_points(zeros, bits, rows, v1=form == V1)
        if scheme.symmetric and bool((points != 2 ** (bits - 1)).any()):
            raise InputError(
                f"{tensors.name('qzeros')} is damaged: quantization_config says sym, and its zero points are not "
                f"all {2 ** (bits - 1)}"
            )
        order = None
        if "g_idx" in tensors:
            g_idx = tensors.take("g_idx", (columns,), torch.int32, torch.int64)
            order = group_order(g_idx, scheme.granularity.group_size, tensors.name("g_idx"))
        unpacked = from_words(codes.t(), bits, columns)
        if order is not None:
            unpacked = unpacked[:, order]
        return AffineLinear(scheme, unpacked, scales.t(), points.t(), order)


def _zero_points(words: Tensor, bits: int, rows: int, *, v1: bool) -> Tensor:
    """``[groups, rows]``. Where a field of v1 wrapped, GPTQModel's addition is undone: of whole words, or of the
    fields where those lie across words."""
    whole = 32 % bits == 0
    if v1 and whole:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        words = words + torch.tensor([ones], dtype=torch.int64).to(torch.int32)
    points = from_words(words, bits, rows)
    return (points + 1) % 2**bits if v1 and not whole else points
