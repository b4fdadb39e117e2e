"""NF4 in bitsandbytes' CUDA kernels: the same codes and scales, handed over as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlquant.errors import missing_package
from rlquant.quant import QuantizedWeight, QuantLinear
from rlquant.quant.formats import NF4_VALUES

__all__ = ["can_run", "to_bitsandbytes_"]

_BLOCK = 64


def can_run(layer: nn.Module) -> bool:
    """Whether bitsandbytes computes what a layer does: NF4 in groups of 64 that do not cross rows."""
    return (
        isinstance(layer, QuantLinear)
        and layer.scheme.weights.name == "nf4"
        and layer.scheme.granularity.group_size == _BLOCK
        and layer.in_features % _BLOCK == 0
        and layer.input_scale is None
        and layer.outlier_index is None
    )


def to_bitsandbytes_(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Let bitsandbytes compute every layer that it can, in place; the number of these layers.

    Layers that share their weight with an embedding stay as they are.

    Args:
        model: on a CUDA device.
        dtype: of the products.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise missing_package("bitsandbytes", "gpu", "NF4 on a GPU") from None
    shared = _used_twice(model)
    done = 0
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if can_run(layer) and id(layer.packed) not in shared:
                setattr(parent, name, _linear4bit(layer, dtype))
                done += 1
    return done


def _used_twice(model: nn.Module) -> set[int]:
    seen: dict[int, int] = {}
    for _, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, QuantizedWeight):
            seen[id(part)] = seen.get(id(part), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def _linear4bit(layer: Any, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    bias = layer.bias is not None
    made = Linear4bit(
        layer.in_features, layer.out_features, bias, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    packed = layer.packed
    # The first of two codes lies in the high bits there, in the low bits here.
    codes = (packed.codes << 4 | packed.codes >> 4).view(-1, 1)
    state = _state(packed, dtype)
    made.weight = Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=state.nested,
        quant_type="nf4",
        bnb_quantized=True,
        module=made,
    )
    made.quant_state = state
    if bias:
        made.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return made.to(packed.codes.device)


def _state(packed: QuantizedWeight, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState, create_dynamic_map

    table: Tensor = torch.tensor(NF4_VALUES, device=packed.codes.device)
    common = {
        "shape": torch.Size(packed.shape),
        "code": table,
        "blocksize": _BLOCK,
        "quant_type": "nf4",
        "dtype": dtype,
    }
    if not packed.scheme.double:
        assert packed.scale is not None
        return QuantState(absmax=packed.scale.reshape(-1).contiguous(), **common)
    codes, ranges, offset = (packed.get_buffer(f"scale_{name}") for name in ("codes", "ranges", "offset"))
    inner = QuantState(
        absmax=ranges, code=create_dynamic_map().to(codes.device), blocksize=256, dtype=torch.float32
    )
    return QuantState(absmax=codes, offset=offset, state2=inner, **common)
