"""GPTQ against the paper's algorithm without blocks, brute force over all codes, and round-to-nearest."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from calibration_data import correlated, linear, loss_of, output_loss, row_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from paper import obq
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import CalibrationWarning, InputMoments, QParams, Scheme, compensate, get_format, quantize_
from rlquant.quant import gptq as gptq_module
from rlquant.quant.compensate import Factor, round_with_compensation
from rlquant.quant.gptq import gptq
from rlquant.quant.tensor import spread_qparams


@pytest.mark.parametrize("scheme", ["int4", "int3-g8", "int2-g5", "int4-tensor"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_codes_are_those_of_obq(scheme: str, act_order: bool, block: int) -> None:
    x = correlated(300, 24).double().numpy()
    hessian = x.T @ x / len(x)
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    parsed = Scheme.parse(scheme)
    limit = int(parsed.weights.max)
    group = parsed.granularity.group_size or 24
    w = weight.double().numpy()
    scales = np.stack([np.abs(w[:, i : i + group]).max(1) / limit for i in range(0, 24, group)], axis=1)
    if scheme.endswith("tensor"):
        scales = np.full((6, 1), np.abs(w).max() / limit)
    stored = scales[:1] if scheme.endswith("tensor") else scales
    qparams = QParams(torch.from_numpy(stored).float())
    factor = Factor(torch.from_numpy(hessian), 0.01, "", act_order)
    rows = spread_qparams(qparams, parsed, 24).scale.expand(6, -1)
    values, losses = round_with_compensation(weight, QParams(rows), parsed.stored, factor, block)
    order = np.argsort(-np.diag(hessian), kind="stable").tolist() if act_order else list(range(24))
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(24)
    spread = np.repeat(scales, group, axis=1)[:, :24]
    expected = np.stack([obq(w[row], damped, order, spread[row], limit) for row in range(6)])
    np.testing.assert_array_equal(np.round(values.numpy() / spread), expected)
    np.testing.assert_allclose(losses.numpy(), row_losses(w - expected * spread, damped), rtol=1e-4)


@given(st.integers(1, 60), st.integers(1, 200), st.integers(0, 1000))
@settings(deadline=None, max_examples=50)
def test_the_factor_is_that_of_the_inverse(columns: int, rows: int, seed: int) -> None:
    x = correlated(rows, columns, seed).double()
    hessian = (x.T @ x / rows).numpy()
    factor = Factor(torch.from_numpy(hessian), 0.01, "")
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(columns)
    order = factor.order.numpy()
    upper = factor.upper.double().numpy()
    np.testing.assert_allclose(upper.T @ upper @ damped[np.ix_(order, order)], np.eye(columns), atol=1e-4)
    assert np.array_equal(upper, np.triu(upper))
    row = torch.randn(2, columns)
    np.testing.assert_allclose(factor.solve(row).double().numpy() @ damped, row.numpy(), atol=1e-3)


@pytest.mark.parametrize("double_columns", [8192, 100])
def test_the_factor_of_many_columns(double_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "DOUBLE_COLUMNS", double_columns)
    x = correlated(3000, 1300, 0).double()
    hessian = (x.T @ x / len(x)).numpy()
    factor = Factor(torch.from_numpy(hessian), 0.01, "")
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(1300)
    order, upper = factor.order.numpy(), factor.upper.double().numpy()
    np.testing.assert_allclose(upper.T @ upper @ damped[np.ix_(order, order)], np.eye(1300), atol=1e-3)
    assert np.array_equal(upper, np.triu(upper))


def test_rows_rounded_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = correlated(200, 24), torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for together in (gptq_module.ROUNDED_TOGETHER, 7 * 24):
        monkeypatch.setattr(gptq_module, "ROUNDED_TOGETHER", together)
        moments = InputMoments(gram=True)
        moments.add(x[None])
        codes, qparams = gptq(weight, Scheme.parse("int3-g8-asym"), moments, "")
        assert qparams is not None
        assert qparams.zero_point is not None
        found.append((codes, qparams.scale, qparams.zero_point))
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole, parts)


def brute_force(weight: np.ndarray, hessian: np.ndarray, scale: float, limit: int) -> float:
    """The least loss of one row over all codes."""
    grid = np.array(list(itertools.product(range(-limit, limit + 1), repeat=len(weight))))
    return float(row_losses(weight - grid * scale, hessian).min())


def test_near_the_best_of_all_codes_of_a_tiny_layer() -> None:
    best = ours = nearest = searched = 0.0
    for seed in range(40):
        x = correlated(200, 4, seed, factors=2)
        layer = linear(4, 2, seed, bias=False)
        w, hessian = layer.weight.detach().double().numpy(), (x.T @ x / len(x)).double().numpy()
        best += sum(brute_force(row, hessian, np.abs(row).max(), 1) for row in w)
        qparams = QParams(layer.weight.detach().abs().amax(1, keepdim=True))
        factor = Factor(torch.from_numpy(hessian), 0.01, "")
        values, _ = round_with_compensation(layer.weight.detach(), qparams, get_format("int2"), factor)
        ours += row_losses(w - values.double().numpy(), hessian).sum()
        searched += 2 * loss_of(layer, "int2", "gptq", x)
        nearest += 2 * loss_of(layer, "int2", "rtn", x)
    assert best <= ours < 1.35 * best
    assert nearest > 1.6 * best
    assert searched < best  # scales of its own beat the best codes at the scale of min-max


def test_the_target_is_the_output_of_the_float_network() -> None:
    with_target = without = 0.0
    for seed in range(6):
        x = correlated(2000, 16, seed)
        net = nn.Sequential(
            linear(16, 32, seed), nn.ReLU(), linear(32, 32, seed + 10), nn.ReLU(), linear(32, 4, seed + 20)
        )
        with_target += loss_of(net, "int3", "gptq", x)
        alone = quantize_(copy.deepcopy(net), "int3", method="gptq", calibration=x, sequential=False)
        without += output_loss(net, alone, x)
    assert with_target < 0.8 * without


def test_the_least_squares_target_is_that_of_lstsq() -> None:
    """Almost without rounding, the layer is the ridge regression of the float output on its inputs."""
    float_inputs = correlated(3000, 12)
    noise = 0.5 * torch.randn(3000, 12, generator=torch.Generator().manual_seed(5))
    drifted = 0.8 * float_inputs + noise + 0.3
    layer = linear(12, 5)
    moments = InputMoments(gram=True, centered=True)
    moments.add(drifted[None], float_inputs[None])
    codes, qparams = gptq(layer.weight.detach(), Scheme.parse("int16"), moments, "")
    assert qparams is not None
    ours = Scheme.parse("int16").weights.decode(codes) * qparams.scale
    a, b = (v.double().numpy() - v.double().numpy().mean(0) for v in (drifted, float_inputs))
    y = b @ layer.weight.detach().double().numpy().T
    h = a.T @ a / len(a)
    w = layer.weight.detach().double().numpy()
    expected = w + (y - a @ w.T).T @ a / len(a) @ np.linalg.inv(h + 0.001 * np.diag(h).mean() * np.eye(12))
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 40), st.integers(1, 120), st.integers(0, 10_000),
    st.sampled_from(["int4", "int2-g7", "int3-asym", "nf4", "fp8_e4m3", "fp4_e2m1-g5", "bf16", "int8-tensor"]),
)  # fmt: skip
def test_never_worse_than_nearest_on_its_calibration(
    outputs: int, inputs: int, rows: int, seed: int, scheme: str
) -> None:
    x, layer = correlated(rows, inputs, seed), linear(inputs, outputs, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        ours = loss_of(layer, scheme, "gptq", x)
    assert ours <= loss_of(layer, scheme, "rtn", x) * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize(
    "scheme", ["int4", "int3", "int3-g16", "int4-asym", "nf4", "fp4_e2m1", "fp8_e4m3", "bf16"]
)
def test_much_better_than_nearest_on_correlated_inputs(scheme: str) -> None:
    x, layer = correlated(2000, 64), linear(64, 32)
    assert loss_of(layer, scheme, "gptq", x) < 0.5 * loss_of(layer, scheme, "rtn", x)


def test_better_than_nearest_on_inputs_it_has_not_seen() -> None:
    seen, unseen = correlated(4000, 64).split(2000)
    layer = linear(64, 32)
    ours = quantize_(copy.deepcopy(layer), "int3", method="gptq", calibration=seen)
    nearest = quantize_(copy.deepcopy(layer), "int3")
    y = layer(unseen)
    assert (ours(unseen) - y).square().mean() < 0.5 * (nearest(unseen) - y).square().mean()


@pytest.mark.parametrize("options", [{}, {"padding": 1, "stride": 2}, {"groups": 2}, {"groups": 4, "dilation": 2},
                                     {"padding": "same", "padding_mode": "circular"}])  # fmt: skip
@pytest.mark.parametrize("scheme", ["int3", "int4-g5", "w4a8"])
def test_convolutions(options: dict[str, object], scheme: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, **options)  # type: ignore[arg-type]
    smooth = torch.nn.functional.interpolate(torch.randn(40, 4, 5, 5), size=12, mode="bilinear")
    images = smooth + 0.1 * torch.randn(40, 4, 12, 12)
    few_columns = layer.groups == 4  # nine inputs leave little to compensate with
    bound = (0.9 if few_columns else 0.7) * loss_of(layer, scheme, "rtn", images)
    assert loss_of(layer, scheme, "gptq", images) < bound


def test_one_scale_for_a_grouped_convolution_is_refused() -> None:
    layer = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(InputError, match=r"take scales per channel, or the method rtn"):
        quantize_(layer, "int4-tensor", method="gptq", calibration=torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("scheme", ["int3", "w4a8"])
def test_recurrent_layers(kind: type[nn.Module], scheme: str) -> None:
    torch.manual_seed(0)
    layer = kind(16, 24, num_layers=2)
    x = correlated(30 * 40, 16).view(30, 40, 16)
    y = layer(x)[0].detach()
    losses = [
        (quantize_(copy.deepcopy(layer), scheme, method=method, calibration=x)(x)[0] - y).square().mean()
        for method in ("gptq", "rtn")
    ]
    assert losses[0] < 0.6 * losses[1]


def test_few_samples_raise_the_damping_and_say_so() -> None:
    layer = linear(64, 8)
    said = "16 calibration rows do not determine .* 64 columns; damping is raised from 0.01 to 0.04"
    with pytest.warns(CalibrationWarning, match=said):
        quantize_(layer, "int4", method="gptq", calibration=correlated(16, 64))


@pytest.mark.parametrize("rows", [100, 3])
def test_constant_and_dead_inputs(rows: int) -> None:
    x = correlated(rows, 8)
    x[:, 2] = 0.0
    x[:, 5] = 1.0
    layer = linear(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        ours = quantize_(copy.deepcopy(layer), "int4", method="gptq", calibration=x)
        zeros = quantize_(copy.deepcopy(layer), "int4", method="gptq", calibration=torch.zeros(rows, 8))
    nearest = quantize_(copy.deepcopy(layer), "int4")
    assert torch.equal(ours.weight[:, 2], nearest.weight[:, 2])
    assert torch.equal(zeros.weight, nearest.weight)
    assert ours.weight.isfinite().all()


def test_a_layer_that_calibration_never_reached_is_rounded_to_nearest() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = linear(8, 4), linear(8, 4, seed=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    module = Unused()
    with pytest.warns(CalibrationWarning, match="layer 'unused': the weight: calibration never reached it"):
        quantize_(module, "int4", method="gptq+bias", calibration=correlated(100, 8))
    assert torch.equal(module.unused.weight, quantize_(Unused(), "int4").unused.weight)


def test_deterministic() -> None:
    x = correlated(500, 32)
    first, second = (quantize_(linear(32, 8), "int3", method="gptq", calibration=x) for _ in range(2))
    assert torch.equal(first.packed.codes, second.packed.codes)
