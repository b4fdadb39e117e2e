"""Preparing, training and converting whole modules."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import (
    QATController,
    QuantConv2d,
    QuantLinear,
    QuantLSTM,
    convert_,
    grid_parameters,
    prepare_empty_,
    prepare_qat_,
    quantize_,
    weight_bytes,
)

SCHEMES = ["int2", "int4-g5-asym", "w2a4", "w3a8", "w8a8-dynamic", "w4a3-tensor", "w16a16", "int3-asym-mse"]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn = kind(5, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


def network(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        net = nn.Sequential(
            nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 3)
        )
        return net, torch.randn(64, 5)
    if kind == "cnn":
        conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        wrapped = nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", groups=2)
        return nn.Sequential(conv, nn.ReLU(), wrapped, nn.Flatten(), nn.Linear(64, 3)), torch.randn(
            16, 2, 8, 8
        )
    return Recurrent(nn.LSTM if kind == "lstm" else nn.GRU), torch.randn(8, 7, 5)


def train(
    net: nn.Module, x: torch.Tensor, target: torch.Tensor, steps: int, controller: QATController | None = None
) -> float:
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if controller is not None:
            controller.step()
    with torch.no_grad():
        return float((net(x) - target).square().mean())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm", "gru"])
def test_conversion_changes_no_bit_and_stores_the_usual_layers(kind: str, scheme: str) -> None:
    net, x = network(kind)
    fresh, target = copy.deepcopy(net), net(x).detach() * 1.5
    prepare_qat_(net, scheme)
    train(net, x, target, 5)
    with torch.no_grad():
        trained = net(x)
        converted = convert_(net)(x)
    assert torch.equal(trained, converted)
    assert not list(net.parameters())
    assert weight_bytes(net) == weight_bytes(prepare_empty_(copy.deepcopy(fresh), scheme))
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    restored = prepare_empty_(fresh, scheme)
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(restored(x), trained)


@given(
    st.integers(2, 16), st.sampled_from(["", "-asym", "-g3", "-tensor", "-g4-asym"]), st.integers(0, 2**16)
)
@settings(max_examples=50, deadline=None)
def test_learned_weights_are_stored_exactly(bits: int, suffix: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer = prepare_qat_(nn.Linear(10, 4), f"int{bits}{suffix}", observer="mse")
    learned = layer.get_submodule("packed")
    with torch.no_grad():  # as if trained: the grid no longer fits the weights
        for parameter in learned.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
        assert torch.equal(learned.cached(), learned.stored().dequantize())


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm", "gru"])
@pytest.mark.parametrize("scheme", ["w4a8", "int4"])
def test_an_untrained_twin_is_round_to_nearest(kind: str, scheme: str) -> None:
    net, x = network(kind)
    expected = quantize_(copy.deepcopy(net), scheme, calibration=x)
    prepare_qat_(net, scheme, calibration=x)
    with torch.no_grad():
        # exp(log(scale)) may be one ulp off, which moves a value on a tie to the neighbouring code
        torch.testing.assert_close(net(x), expected(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm", "gru"])
def test_training_wins_back_what_rounding_loses(kind: str) -> None:
    net, x = network(kind)
    target = net(x).detach()
    rounded = quantize_(copy.deepcopy(net), "w2a4", calibration=x)
    with torch.no_grad():
        lost = float((rounded(x) - target).square().mean())
    prepare_qat_(net, "w2a4", calibration=x, observer="mse")
    assert train(net, x, target, 150) < 0.3 * lost


def test_parameters_stay_the_objects_an_optimiser_holds() -> None:
    net, x = network("mlp")
    before = {id(p) for p in net.parameters()}
    net.requires_grad_(False)
    prepare_qat_(net, "w4a4-asym")
    after = list(net.parameters())
    grids = {id(p) for p in grid_parameters(net)}
    assert {id(p) for p in after} == before | grids
    assert not before & grids
    assert len(grids) == 3 * 4  # scale and zero point of weight and input of each of three layers
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in after)


def test_layers_that_are_skipped_stay_float() -> None:
    net, x = network("mlp")
    prepare_qat_(net, "w2a8", calibration=x, skip=["0"])
    prepare_qat_(net, "w8a8", calibration=x)  # another scheme for what is left
    assert [type(layer) for layer in net if not isinstance(layer, nn.Tanh | nn.ReLU)] == [QuantLinear] * 3
    convert_(net)
    assert [net[i].scheme.name for i in (0, 2, 4)] == ["w8a8", "w2a8", "w2a8"]


@pytest.mark.parametrize(
    ("module", "kind"),
    [(nn.Linear(3, 2), QuantLinear), (nn.Conv2d(1, 1, 2), QuantConv2d), (nn.LSTM(2, 2), QuantLSTM)],
)
def test_a_single_layer_is_replaced(module: nn.Module, kind: type[nn.Module]) -> None:
    assert type(convert_(prepare_qat_(module, "int4"))) is kind


def test_the_delay_trains_in_float_then_snaps_to_what_was_seen() -> None:
    net, x = network("mlp")
    plain, target = copy.deepcopy(net), torch.randn(64, 3)
    prepare_qat_(net, "w2a2")
    controller = QATController(net, delay=20, freeze_after=10)
    train(plain, x, target, 19)
    train(net, x, target, 19, controller)
    assert torch.equal(net(x), plain(x))
    train(net, x, target, 1, controller)
    assert not torch.equal(net(x), plain(x))
    first = net[0].get_submodule("input_quant")
    qparams = first.qparams()
    reach = (3 - qparams.zero_point) * qparams.scale, -qparams.zero_point * qparams.scale
    span = float(reach[0] - reach[1])
    assert span == pytest.approx(float(x.max() - x.min()), rel=0.01)
    learning = [p.clone() for p in grid_parameters(net)]
    train(net, x, target, 10, controller)
    assert any(not torch.equal(a, b) for a, b in zip(learning, grid_parameters(net), strict=True))
    frozen, weights = [p.clone() for p in grid_parameters(net)], net[0].packed.weight.clone()
    train(net, x, target, 3, controller)
    assert all(torch.equal(a, b) for a, b in zip(frozen, grid_parameters(net), strict=True))
    assert not torch.equal(weights, net[0].packed.weight)


def test_a_checkpoint_resumes_inside_the_delay() -> None:
    net, x = network("mlp")
    fresh = copy.deepcopy(net)
    prepare_qat_(net, "w3a3")
    QATController(net, delay=10)
    net(x)
    prepare_qat_(fresh, "w3a3").load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    for module in (net, fresh):
        controller = QATController(module, delay=1)
        controller.step()
    assert torch.equal(fresh(x), net(x))
    assert torch.equal(convert_(fresh)(x), net(x))


def test_zero_stays_exact_whatever_is_learned() -> None:
    net, x = network("mlp")
    prepare_qat_(net, "w4a3-asym", calibration=x)
    train(net, x, torch.randn(64, 3), 30)
    for layer in (net[0], net[2], net[4]):
        assert not layer.get_submodule("input_quant")(torch.zeros(5)).any()
        layer.get_submodule("packed").weight.data.zero_()
        assert not layer.weight.any()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("nf4", "learns integer grids, and nf4 has none: take int4"),
        ("bf16", "take int16"),
        ("fp32", "take int16"),
    ],
)
def test_schemes_without_an_integer_grid_are_refused(scheme: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_qat_(nn.Linear(2, 2), scheme)


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(InputError, match="no layer in training"):
        convert_(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no layer in training"):
        QATController(nn.Linear(2, 2))
    with pytest.raises(InputError, match="never saw a batch"):
        convert_(prepare_qat_(nn.Linear(2, 2), "w8a8"))
    layer = prepare_qat_(nn.Sequential(nn.Linear(2, 2)), "int4")
    layer[0].packed.weight.data[0, 0] = torch.nan
    with pytest.raises(InputError, match="weight of layer '0' holds NaN"):
        convert_(layer)
    with pytest.raises(InputError, match="0 or more"):
        QATController(layer, delay=-1)
