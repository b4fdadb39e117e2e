"""Rewrites of float layers leave the function as it is; bias correction restores means."""

import copy

import pytest
import torch
from calibration_data import correlated, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import Link, center_head_, find_links, fold_scale_, quantizable, quantize_


@settings(deadline=None)
@given(st.integers(2, 9), st.integers(1, 12), st.booleans(), st.integers(0, 1000))
def test_a_centred_head_has_the_same_argmax_and_softmax(
    actions: int, inputs: int, bias: bool, seed: int
) -> None:
    head = linear(inputs, actions, seed, bias).double()
    with torch.no_grad():
        head.weight += 3.0
    x = torch.randn(50, inputs, generator=torch.Generator().manual_seed(seed)).double()
    before = head(x)
    assert center_head_(head) is head
    after = head(x)
    assert torch.equal(after.argmax(1), before.argmax(1))
    torch.testing.assert_close(after.softmax(1), before.softmax(1))
    torch.testing.assert_close(after.mean(1), torch.zeros(50).double())


def test_only_a_head_of_several_outputs_is_centred() -> None:
    for other in (nn.Linear(3, 1), nn.ReLU()):
        with pytest.raises(InputError, match="only a Linear head of several outputs"):
            center_head_(other)  # type: ignore[arg-type]


CHAINS = {
    "linear": (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(20, 6)),
    "leaky, no bias": (
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.LeakyReLU(0.2), nn.Dropout(), nn.Linear(8, 3)),
        torch.randn(20, 6),
    ),
    "convolutions": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)),
        torch.randn(5, 2, 9, 9),
    ),
    "flattened image": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)),
        torch.randn(5, 2, 5, 5),
    ),
    "norm": (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(20, 6)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_folded_scale_changes_no_output(name: str) -> None:
    chain, x = CHAINS[name]
    chain = copy.deepcopy(chain).double().eval()
    before = chain(x.double())
    producer, consumer = chain[0], chain[-1]
    scale = torch.logspace(-2, 2, len(producer.weight)).double()
    weight = producer.weight.detach().clone()
    fold_scale_(producer, [consumer], scale)
    torch.testing.assert_close(chain(x.double()), before)
    assert not torch.allclose(producer.weight, weight)


def test_a_scale_that_cannot_be_folded_is_refused_and_changes_nothing() -> None:
    producer, consumer = linear(6, 8), linear(8, 3)
    before = producer.weight.clone()
    for scale, other, message in [
        (torch.tensor([1.0] * 7 + [0.0]), consumer, "only positive finite factors"),
        (torch.tensor([1.0] * 7 + [float("inf")]), consumer, "only positive finite factors"),
        (torch.ones(7), consumer, "7 factors do not fit a producer of 8 channels"),
        (torch.full((8,), 2.0), linear(9, 3), "does not read 8 channels"),
    ]:
        with pytest.raises(InputError, match=message):
            fold_scale_(producer, [other], scale)
    assert torch.equal(producer.weight, before)


def test_links_are_found_only_where_scales_pass() -> None:
    shared = nn.Linear(4, 4)
    module = nn.ModuleDict(
        {
            "relu": nn.Sequential(
                nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
            ),
            "tanh": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
            "shared": nn.Sequential(shared, nn.ReLU(), shared),
            "grouped": nn.Sequential(
                nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)
            ),
            "list": nn.ModuleList([nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)]),
        }
    )
    assert find_links(module, quantizable(module)) == [
        Link("relu.0", ("relu.2.0",)),
        Link("relu.2.0", ("relu.3",)),
        Link("grouped.2", ("grouped.4",)),
    ]
    assert find_links(module, ["relu.0", "relu.3"]) == []


@pytest.mark.parametrize("scheme", ["int2", "w3a4", "int3-g4-asym"])
@pytest.mark.parametrize("rule", ["rtn", "gptq"])
@pytest.mark.parametrize("sequential", [True, False])
def test_corrected_biases_restore_every_mean_output(scheme: str, rule: str, sequential: bool) -> None:
    x = correlated(500, 12)
    net = nn.Sequential(linear(12, 16), nn.ReLU(), linear(16, 16, 1), nn.ReLU(), linear(16, 4, 2, bias=False))
    quantized = quantize_(
        copy.deepcopy(net), scheme, method=f"{rule}+bias", calibration=x, sequential=sequential
    )
    for depth in (1, 3, 5) if sequential else (1,):
        expected, restored = net[:depth](x).mean(0), quantized[:depth](x).mean(0)
        torch.testing.assert_close(restored, expected, atol=2e-5, rtol=1e-4)
    plain = quantize_(copy.deepcopy(net), scheme, method=rule, calibration=x)
    assert (plain(x).mean(0) - net(x).mean(0)).abs().max() > 1e-3
    assert quantized[4].bias is not None


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([1, 2]), st.sampled_from(["zeros", "circular"]), st.integers(0, 100))
def test_bias_correction_of_convolutions_counts_the_border(groups: int, mode: str, seed: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 4, 3, padding=1, groups=groups, padding_mode=mode)
    images = torch.rand(10, 2, 6, 6)
    quantized = quantize_(copy.deepcopy(conv), "w2a8", method="bias", calibration=images)
    torch.testing.assert_close(
        quantized(images).mean((0, 2, 3)), conv(images).mean((0, 2, 3)), atol=1e-5, rtol=1e-4
    )


def test_recurrent_biases_are_corrected() -> None:
    torch.manual_seed(0)
    layer = nn.GRU(6, 16)
    x = correlated(600, 6).view(20, 30, 6) + 1.0
    hidden = torch.cat([torch.zeros(1, 30, 16), layer(x)[0][:-1]])
    quantized = quantize_(copy.deepcopy(layer), "int3", method="bias", calibration=x)
    for part, seen in (("ih", x), ("hh", hidden)):
        weight, bias = getattr(layer, f"weight_{part}_l0"), getattr(layer, f"bias_{part}_l0")
        restored = getattr(quantized, f"packed_{part}_l0").dequantize()
        expected = seen.mean((0, 1)) @ weight.T + bias
        corrected = seen.mean((0, 1)) @ restored.T + getattr(quantized, f"bias_{part}_l0")
        torch.testing.assert_close(corrected, expected, atol=1e-5, rtol=1e-4)
