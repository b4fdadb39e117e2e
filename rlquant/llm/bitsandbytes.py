"""bitsandbytes' kernels on our codes and scales, handed over as they are: nothing is quantized again.

NF4 is the same computation as ours, faster. **LLM.int8** (Dettmers et al. 2022, arXiv:2208.07339) is not the
computation of our ``int8``, whose activations stay in float: it rounds the activations of each token to int8 too,
except for columns that hold a magnitude of at least 6, which are multiplied in float. So it is a precision of its own,
``llm-int8``, and is computed where it is asked for and nowhere else.

Our ``fp4_e2m1`` cannot be handed over: bitsandbytes' FP4 has another smallest value, 1/192 of its largest where E2M1
has 1/12, and its kernels take no other table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlquant.errors import InputError, missing_package
from rlquant.quant import QuantizedWeight, QuantLinear
from rlquant.quant.formats import NF4_VALUES

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = ["can_run", "can_run_int8", "require_bitsandbytes", "to_bitsandbytes_", "to_llm_int8_"]

_BLOCK = 64
OUTLIER = 6.0
"""From this magnitude on a column of activations stays in float, in LLM.int8: the paper's threshold."""


def can_run(layer: nn.Module) -> bool:
    """Whether bitsandbytes computes what a layer does: NF4 in groups of 64 that do not cross rows."""
    return (
        _is_plain(layer)
        and layer.scheme.weights.name == "nf4"
        and layer.scheme.granularity.group_size == _BLOCK
        and layer.in_features % _BLOCK == 0
    )


def can_run_int8(layer: nn.Module) -> bool:
    """Whether LLM.int8 can multiply with a layer's weight: symmetric int8, one scale a row, float activations."""
    if not _is_plain(layer):
        return False
    scheme = layer.scheme
    per_row = scheme.granularity.kind == "channel" and scheme.symmetric
    return scheme.weights.name == "int8" and per_row and scheme.activations is None


def _is_plain(layer: nn.Module) -> TypeGuard[QuantLinear]:
    return isinstance(layer, QuantLinear) and layer.input_scale is None and layer.outlier_index is None


def to_bitsandbytes_(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    """Let bitsandbytes compute every NF4 layer that it can, in place; the number of these layers.

    Layers that share their weight with an embedding stay as they are.

    Args:
        model: on a CUDA device.
        dtype: of the products.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    require_bitsandbytes("NF4 on a GPU")
    return _replace(model, can_run, lambda layer: _linear4bit(layer, dtype))


def to_llm_int8_(model: nn.Module) -> int:
    """Let bitsandbytes compute every quantized linear layer by LLM.int8, in place; the number of these layers.

    Args:
        model: with layers of scheme ``int8``, on any device that bitsandbytes knows, the CPU too.

    Raises:
        InputError: bitsandbytes is not installed, or some layer is quantized otherwise (it is named).
    """
    require_bitsandbytes("LLM.int8")
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and not can_run_int8(layer):
            raise InputError(
                f"LLM.int8 cannot multiply with {name}, quantized to {layer.scheme.name}: take int8"
            )
    # It says at every product that it casts bfloat16 to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return _replace(model, can_run_int8, _linear8bit)


def require_bitsandbytes(what: str) -> None:
    """Raises InputError where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise missing_package("bitsandbytes", "gpu", what) from None


def _replace(model: nn.Module, can: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> int:
    shared = _used_twice(model)
    done = 0
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if can(layer) and id(layer.packed) not in shared:
                setattr(parent, name, make(layer).train(layer.training))
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


def _linear8bit(layer: QuantLinear) -> Any:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    packed = layer.packed
    made = Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIER,
        device="meta",
    )
    assert packed.scale is not None
    codes = packed.codes.view(torch.int8).view(packed.shape)
    largest = packed.scale.reshape(-1) * 127  # which bitsandbytes stores for a scale
    made.weight = Int8Params(codes, requires_grad=False, CB=codes, SCB=largest)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made


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
