"""LoftQ's initialisation of adapters for a base whose codes are given (Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware
Quantization").

LoftQ alternates between quantizing ``W - BA`` and taking the leading singular vectors of ``W - Q``. Here the base is
immutable and shared by several adapters, so only the second step is taken, once: it makes ``Q + BA`` the best
approximation of ``W`` (Frobenius norm) that an adapter of this rank can give. Nothing needs a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlquant.errors import InputError

__all__ = ["init_loftq_", "leading_product"]


@torch.no_grad()
def init_loftq_(model: nn.Module, name: str, weights: Mapping[str, Tensor]) -> None:
    """Set an adapter to what quantization lost, as far as its rank reaches.

    A trained adapter then belongs to the quantized base: merge it with the dequantized base, not with the float one.

    Args:
        model: with the adapter on it.
        name: of the adapter.
        weights: float weights ``[out, in]`` by their names in the model without adapters.

    Raises:
        InputError: a weight is missing or has other sizes.
    """
    from rlquant.llm.adapter_layer import adapter_layers, float_weight

    for key, layer in adapter_layers(model):
        if name not in layer.lora_A:
            continue
        weight = weights.get(f"{key}.weight")
        if weight is None or tuple(weight.shape) != (layer.out_features, layer.in_features):
            raise InputError(
                f"init loftq needs the float weight {key}.weight: it is missing or of other sizes"
            )
        base = float_weight(layer.get_base_layer())
        residual = weight.to(base.device, torch.float32) - base
        b, a = leading_product(residual, layer.r[name])
        layer.lora_B[name].weight.copy_(b / layer.scaling[name])
        layer.lora_A[name].weight.copy_(a)
        if name in layer.lora_magnitude_vector:  # DoRA starts at the norms of the rows of the sum
            norms = torch.linalg.norm(base + b @ a, dim=1)
            layer.lora_magnitude_vector[name].weight.copy_(norms)


def leading_product(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``B [out, rank]`` and ``A [rank, in]`` whose product is nearest to ``matrix``, of equal norms each.

    By the eigenvectors of the smaller Gram matrix: what rounding leaves has a flat spectrum, on which randomized
    methods converge slowly. Ranks beyond the matrix's are zero.
    """
    if matrix.shape[0] < matrix.shape[1]:
        a, b = leading_product(matrix.T, rank)
        return b.T, a.T
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    right = vectors[:, -rank:].flip(1)  # eigh's come in ascending order
    left = matrix @ right
    root = torch.linalg.norm(left, dim=0).sqrt()
    b, a = left / root.clamp_min(1e-12), (right * root).T
    short = rank - right.shape[1]
    return nn.functional.pad(b, (0, short)), nn.functional.pad(a, (0, 0, 0, short))
