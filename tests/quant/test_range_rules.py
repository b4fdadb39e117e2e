"""Rules that choose ranges: optimal clipping, activation-aware clipping, half-quadratic."""

import copy

import numpy as np
import pytest
import torch
from calibration_data import correlated, linear, loss_of, output_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlquant.quant import Scheme, quantize_
from rlquant.quant.clip import clipped_qparams
from rlquant.quant.hqq import P

SCALED = ["int4", "int3-g7", "int2-asym", "int4-tensor", "nf4", "fp4_e2m1-g5", "fp8_e4m3"]


def heavy_tailed(inputs: int = 64, outputs: int = 16, seed: int = 0) -> nn.Linear:
    layer = linear(inputs, outputs, seed)
    with torch.no_grad():
        normal = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
        layer.weight.copy_(normal.sign() * normal.abs() ** 2.5 * 0.1)
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_finds_the_best_symmetric_range_of_each_channel(bits: int) -> None:
    layer = heavy_tailed()
    quantized = quantize_(copy.deepcopy(layer), f"int{bits}", method="mse")
    limit = 2 ** (bits - 1) - 1
    for row, ours in zip(
        layer.weight.detach().double().numpy(), quantized.weight.double().numpy(), strict=True
    ):
        steps = np.abs(row).max() / limit * np.linspace(0.2, 1.0, 2000)[:, None]
        grid = np.clip(np.round(row / steps), -limit, limit) * steps
        best = np.square(grid - row).sum(1).min()
        assert np.square(ours - row).sum() <= 1.02 * best
    assert quantized.scheme == Scheme.parse(f"int{bits}")  # the observer is the method's, not the scheme's


@pytest.mark.parametrize("scheme", ["int3", "int2-asym", "nf4-channel"])
def test_clip_finds_the_best_range_of_each_channel_for_the_output(scheme: str) -> None:
    layer, x = heavy_tailed(24, 6), correlated(300, 24)
    parsed = Scheme.parse(scheme)
    values = parsed.stored.values().double().numpy()
    values = values[values >= -parsed.stored.max]  # symmetric grids leave out the lowest integer
    qparams = clipped_qparams(layer.weight.detach(), parsed, x)
    inputs = x.double().numpy()
    for row, scale in zip(layer.weight.detach().double().numpy(), qparams.scale[:, 0].numpy(), strict=True):
        low, high = (
            (min(row.min(), 0.0), max(row.max(), 0.0)) if not parsed.symmetric else (0.0, np.abs(row).max())
        )
        full = (high - low) / parsed.stored.max
        zero = np.round(-low / full)
        losses = []
        for step in (float(scale), *(full * np.linspace(0.2, 1.0, 33))):
            nearest = values[np.abs((row / step + zero)[:, None] - values).argmin(1)]
            losses.append(np.square(inputs @ ((nearest - zero) * step - row)).sum())
        assert losses[0] <= min(losses[1:]) * (1 + 1e-3)


@pytest.mark.parametrize("scheme", SCALED)
def test_clip_is_better_than_nearest_on_its_calibration(scheme: str) -> None:
    x = correlated(1000, 64)
    layer = heavy_tailed()
    assert loss_of(layer, scheme, "clip", x) <= loss_of(layer, scheme, "rtn", x)


def lp_error(layer: nn.Linear, scheme: str, method: str) -> float:
    restored = quantize_(copy.deepcopy(layer), scheme, method=method).weight
    return float((layer.weight.detach() - restored).double().abs().pow(P).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 1000), st.sampled_from(SCALED))
def test_hqq_is_never_worse_than_nearest_in_its_norm(
    outputs: int, inputs: int, seed: int, scheme: str
) -> None:
    layer = heavy_tailed(inputs, outputs, seed)
    assert lp_error(layer, scheme, "hqq") <= lp_error(layer, scheme, "rtn") * (1 + 1e-5)


@pytest.mark.parametrize(
    ("scheme", "share"), [("int4", 0.95), ("int3", 0.95), ("int4-asym", 0.98), ("int3-g16", 0.99)]
)
def test_hqq_saves_error_on_heavy_tails(scheme: str, share: float) -> None:
    assert lp_error(heavy_tailed(256), scheme, "hqq") < share * lp_error(heavy_tailed(256), scheme, "rtn")


def test_hqq_does_not_depend_on_the_unit() -> None:
    small, large = heavy_tailed(), heavy_tailed()
    with torch.no_grad():
        large.weight.mul_(1024.0)
    codes = [quantize_(layer, "int3-asym", method="hqq").packed.codes for layer in (small, large)]
    assert torch.equal(*codes)


@pytest.mark.parametrize("method", ["mse", "hqq", "clip"])
def test_weights_at_the_edges(method: str) -> None:
    x = correlated(50, 8)
    for fill in (0.0, 3.0, -1e-30):
        layer = nn.Linear(8, 3)
        nn.init.constant_(layer.weight, fill)
        for scheme in ("int2", "int4-g3-asym", "nf4"):
            quantized = quantize_(copy.deepcopy(layer), scheme, method=method, calibration=x)
            assert output_loss(layer, quantized, x) < 1e-6


@pytest.mark.parametrize("method", ["mse", "hqq", "clip", "awq", "outlier"])
def test_recurrent_and_grouped_layers(method: str) -> None:
    torch.manual_seed(0)
    gru, conv = nn.GRU(6, 8), nn.Conv2d(4, 8, 3, groups=2)
    for layer, x in ((gru, torch.randn(7, 5, 6)), (conv, torch.randn(3, 4, 9, 9))):

        def run(module: nn.Module, x: torch.Tensor = x) -> torch.Tensor:
            out = module(x)
            return out[0] if isinstance(out, tuple) else out

        if method == "outlier":
            with pytest.warns(
                UserWarning, match="outliers are kept in Linear layers and in Conv2d without groups"
            ):
                quantized = quantize_(copy.deepcopy(layer), "int4", method=method, calibration=x)
        else:
            quantized = quantize_(copy.deepcopy(layer), "int4", method=method, calibration=x)
        plain = quantize_(copy.deepcopy(layer), "int4")
        error, nearest = ((run(each) - run(layer)).square().mean() for each in (quantized, plain))
        assert error <= 1.1 * nearest
