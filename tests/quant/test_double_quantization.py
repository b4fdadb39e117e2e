"""NF4 and its double-quantized scales against bitsandbytes, an embedding, and a linear map that stays packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import (
    QuantEmbedding,
    QuantizedWeight,
    QuantLinear,
    Scheme,
    quantize_,
    size_table,
    weight_bytes,
)
from rlquant.quant.double import double_dequantize, double_quantize
from rlquant.quant.packed_linear import linear_of_packed

functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(96, 512, generator=torch.Generator().manual_seed(0)) * 0.05


def test_nf4_is_bitsandbytes_to_the_bit(weight: torch.Tensor) -> None:
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    ours = QuantizedWeight.from_float(weight, Scheme.parse("nf4"))
    assert torch.equal(ours.dequantize(), functional.dequantize_4bit(codes, state))
    swapped = (codes.reshape(-1) >> 4) | (codes.reshape(-1) << 4)  # the first of two in the high bits there
    assert torch.equal(ours.codes, swapped)


def test_double_quantized_scales_are_bitsandbytes(weight: torch.Tensor) -> None:
    _, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    _, single = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    codes, ranges, offset = double_quantize(single.absmax)
    assert torch.equal(ranges, state.state2.absmax)
    assert offset == state.offset
    apart = (codes.int() - state.absmax.int()).abs()
    assert apart.max() <= 1  # its CPU kernel rounds a few of those in the middle to the other side
    assert (apart > 0).float().mean() < 0.01
    theirs = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(double_dequantize(codes, ranges, offset)[apart == 0], theirs[apart == 0])


def test_double_quantization_costs_an_eighth_of_a_bit(weight: torch.Tensor) -> None:
    layer = nn.Linear(512, 96, bias=False)
    layer.weight.data = weight
    quantized = quantize_(nn.Sequential(layer), "nf4-dq")
    (row,) = size_table(quantized)
    assert row.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256) + 32 / weight.numel(), rel=1e-3)
    error, single = (
        (quantize_(nn.Sequential(layer), name)[0].weight - weight).square().mean()
        for name in ("nf4-dq", "nf4")
    )
    assert single < error < 1.05 * single


def test_what_is_stored_comes_back(weight: torch.Tensor) -> None:
    one = QuantizedWeight.from_float(weight, Scheme.parse("int4-g32-asym-dq"))
    other = QuantizedWeight(tuple(weight.shape), one.scheme)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.half().dequantize(), other.dequantize())
    assert Scheme.parse(one.scheme.name) == one.scheme


@pytest.mark.parametrize("name", ["int8", "int4-g32", "nf4-dq", "int3", "bf16", "int4-g32-asym"])
def test_an_embedding_gives_the_rows_of_its_table(name: str) -> None:
    table = nn.Embedding(50, 128)
    quantized = QuantEmbedding(table, Scheme.parse(name))
    quantized.load_float(table)
    quantized.packed.caches = False
    ids = torch.tensor([[3, 3, 49], [0, 7, 21]])
    assert torch.equal(quantized(ids), nn.functional.embedding(ids, quantized.packed.dequantize()))
    assert quantized(ids).dtype == table.weight.dtype


def test_an_embedding_has_no_activations() -> None:
    with pytest.raises(InputError, match="w8a8 cannot be the scheme of an embedding"):
        QuantEmbedding(nn.Embedding(4, 8), Scheme.parse("w8a8"))


def test_a_packed_linear_is_linear_and_so_are_its_gradients() -> None:
    layer = nn.Linear(64, 24)
    packed = QuantizedWeight.from_float(layer.weight, Scheme.parse("nf4"))
    packed.caches = False
    x = torch.randn(3, 5, 64, requires_grad=True)
    bias = layer.bias.detach().clone().requires_grad_()
    factor = torch.randn(3, 5, 24)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        ours = linear_of_packed(x, packed, bias)
    assert kept == []
    theirs = nn.functional.linear(x, packed.dequantize(), bias)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad((y * factor).sum(), (x, bias)) for y in (ours, theirs)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other)
    assert packed._cache is None


def test_tied_weights_count_once() -> None:
    table, head = nn.Embedding(20, 64), nn.Linear(64, 20, bias=False)
    embedding, output = QuantEmbedding(table, Scheme.parse("int8")), QuantLinear(head, Scheme.parse("int8"))
    embedding.load_float(table)
    alone = weight_bytes(nn.ModuleList([embedding]))
    output.packed = embedding.packed
    assert weight_bytes(nn.ModuleList([embedding, output])) == alone


def test_only_groups_have_scales_to_quantize() -> None:
    with pytest.raises(InputError, match="'-dq' quantizes the scales of groups"):
        Scheme.parse("int8-dq")
