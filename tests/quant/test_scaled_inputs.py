"""AWQ, SmoothQuant and cross-layer equalization: equations, invariance in float, and the error they save."""

import copy

import numpy as np
import pytest
import torch
from calibration_data import correlated, linear, loss_of, output_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlquant.quant import (
    METHODS,
    Bench,
    CalibrationWarning,
    Link,
    Scheme,
    Transform,
    quantizable,
    quantize_,
    size_table,
)
from rlquant.quant.cle import equalizing_scale
from rlquant.quant.smoothquant import smoothing_factors


def net(act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(linear(8, 32), act(), linear(32, 32, 1), act(), linear(32, 4, 2))


def image_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip


def rewritten(module: nn.Module, transform: str, scheme: str, x: torch.Tensor) -> nn.Module:
    """A float copy that only the transform has changed."""
    bench = Bench(module, dict.fromkeys(quantizable(module), Scheme.parse(scheme)), x)
    part = METHODS[transform]
    assert isinstance(part, Transform)
    part.apply(bench)
    copied = copy.deepcopy(module)
    for name, twin in bench.twins.items():
        wrapped = nn.Sequential(Times(twin.input_scale), copy.deepcopy(twin.layer))
        parent = copied.get_submodule(name.rpartition(".")[0])
        parent._modules[name.rpartition(".")[2]] = wrapped
    return copied


class Times(nn.Module):
    def __init__(self, factor: torch.Tensor | None) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factor is None:
            return x
        return x * (self.factor[:, None, None] if x.dim() == 4 else self.factor)


@pytest.mark.parametrize("transform", ["awq", "smoothquant", "cle"])
@pytest.mark.parametrize("kind", ["relu", "tanh", "image"])
@pytest.mark.filterwarnings("ignore::rlquant.quant.CalibrationWarning")
def test_the_float_function_stays_the_same(transform: str, kind: str) -> None:
    module = image_net() if kind == "image" else net(nn.Tanh if kind == "tanh" else nn.ReLU)
    x = torch.rand(30, 3, 8, 8) if kind == "image" else correlated(200, 8)
    before = {name: part.weight.clone() for name, part in quantizable(module).items()}
    changed = rewritten(module, transform, "w4a4", x)
    torch.testing.assert_close(changed(x), module(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(part.weight, before[name]) for name, part in quantizable(module).items())
    if (transform, kind) != ("cle", "tanh"):
        assert not all(
            torch.equal(changed.get_submodule(name)[1].weight, weight) for name, weight in before.items()
        )


def test_scales_are_folded_where_that_is_exact_and_stored_elsewhere() -> None:
    x = correlated(500, 8)
    relu = quantize_(net(), "int4", method="awq", calibration=x)
    assert relu[0].input_scale is not None
    assert relu[2].input_scale is None
    assert relu[4].input_scale is None
    tanh = quantize_(net(nn.Tanh), "int4", method="awq", calibration=x)
    table = {row.name: row for row in size_table(tanh)}
    assert table["2"].scales == 32 * 4 + 32 * 4  # of the output channels, of the inputs
    assert float(tanh[2].input_scale.max()) == 1.0  # no input grows


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_awq_saves_much_of_the_error_of_unequal_inputs(act: type[nn.Module]) -> None:
    x = correlated(1000, 8)
    for scheme in ("int4", "int3", "int3-g8", "nf4"):
        assert loss_of(net(act), scheme, "awq", x) < 0.75 * loss_of(net(act), scheme, "rtn", x)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000),
    st.sampled_from(["int3", "int4-g4", "nf4", "w4a4", "int2-asym"]), st.sampled_from(["awq+rtn", "smoothquant"]),
)  # fmt: skip
def test_a_searched_scale_never_worsens_a_layer_on_its_sample(
    inputs: int, outputs: int, seed: int, scheme: str, method: str
) -> None:
    scheme = "w4a4" if method == "smoothquant" else scheme
    x, layer = correlated(200, inputs, seed), linear(inputs, outputs, seed)
    assert loss_of(layer, scheme, method, x) <= loss_of(layer, scheme, "rtn", x) * (1 + 1e-4)


def test_smoothquant_saves_much_of_the_error_of_one_grid_for_unequal_inputs() -> None:
    x = correlated(1000, 16) * torch.logspace(-1, 1, 16)
    layer = linear(16, 8)
    for scheme in ("w8a4", "w8a8", "w8a6-dynamic"):
        assert loss_of(layer, scheme, "smoothquant", x) < 0.3 * loss_of(layer, scheme, "rtn", x)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=9),
    st.floats(0.0, 1.0),
)
def test_smoothing_factors_are_equation_4(sizes: list[tuple[float, float]], alpha: float) -> None:
    x, w = (np.array(side) for side in zip(*sizes, strict=True))
    ours = smoothing_factors(torch.from_numpy(x), torch.from_numpy(w), alpha).numpy()
    np.testing.assert_allclose(ours, np.exp(alpha * np.log(x) - (1 - alpha) * np.log(w)), rtol=1e-9)


def test_smoothing_factors_of_dead_channels_are_harmless() -> None:
    ours = smoothing_factors(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert ours.tolist() == [1.0, 1.0, 1.0]
    assert smoothing_factors(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000))
def test_equalized_ranges_are_the_geometric_mean(channels: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, channels, generator=g).double() + 0.01
    scale = equalizing_scale(first, second)
    torch.testing.assert_close(first / scale, (first * second).sqrt())
    torch.testing.assert_close(second * scale, (first * second).sqrt())
    assert equalizing_scale(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])).tolist() == [1.0, 1.0]


def test_a_chain_is_equalized_as_a_whole() -> None:
    module = net()
    with torch.no_grad():
        module[0].weight.mul_(torch.logspace(-2, 2, 32)[:, None])
        module[4].weight.mul_(torch.logspace(2, -2, 32))
    changed = rewritten(module, "cle", "int8-tensor", torch.empty(0))
    for producer, consumer in ((0, 2), (2, 4)):
        rows = changed[producer][1].weight.abs().amax(1)
        columns = changed[consumer][1].weight.abs().amax(0)
        torch.testing.assert_close(rows, columns, rtol=2e-3, atol=0.0)
    x = correlated(300, 8)
    assert loss_of(module, "int8-tensor", "cle", x) < 0.25 * loss_of(module, "int8-tensor", "rtn", x)


def test_cle_says_where_it_finds_nothing() -> None:
    with pytest.warns(CalibrationWarning, match="cle found no two layers"):
        quantize_(net(nn.Tanh), "int8", method="cle")


class Block(nn.Module):
    """The wiring of a transformer block, which no nn.Sequential shows: a norm read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.gate, self.up, self.down = linear(16, 24), linear(16, 24, 1), linear(24, 16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(torch.sigmoid(self.gate(h)) * self.up(h))


BLOCK_LINKS = [Link("norm", ("gate", "up")), Link("up", ("down",))]


@pytest.mark.parametrize(
    ("method", "scheme"), [("awq", "int3"), ("awq+gptq", "w4a8"), ("smoothquant", "w8a4")]
)
def test_links_that_are_told_fold_into_a_norm_and_several_consumers(method: str, scheme: str) -> None:
    x = correlated(600, 16)
    block = Block()
    float_norm, before = block.norm, block.norm.weight.clone()
    expected = block(x).detach()
    quantized = quantize_(block, scheme, method=method, calibration=x, links=BLOCK_LINKS)
    assert all(part.input_scale is None for part in (block.gate, block.up, block.down))
    assert not torch.equal(quantized.norm.weight, before)
    assert torch.equal(float_norm.weight, before)  # whoever else holds the norm keeps it
    plain = quantize_(Block(), scheme, calibration=x)
    assert (quantized(x) - expected).square().mean() < 0.8 * (plain(x) - expected).square().mean()


@pytest.mark.parametrize("method", ["awq", "smoothquant+gptq+bias"])
def test_an_error_leaves_the_module_as_it_was(method: str) -> None:
    module = net()
    with torch.no_grad():
        module[4].bias[0] = float("nan")
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="layer '4': the bias holds NaN"):
        quantize_(module, "w4a8", method=method, calibration=correlated(100, 8))
    assert list(quantizable(module)) == ["0", "2", "4"]
    assert all(
        torch.equal(value, state[name]) or name == "4.bias" for name, value in module.state_dict().items()
    )


def test_convolutions_are_scaled_by_channel() -> None:
    torch.manual_seed(0)
    images = torch.rand(40, 6, 8, 8) * torch.logspace(-1, 1, 6)[:, None, None]
    conv = nn.Conv2d(6, 8, 3, padding=1)
    for method, scheme in (("awq", "int3"), ("smoothquant", "w8a4")):
        quantized = quantize_(copy.deepcopy(conv), scheme, method=method, calibration=images)
        assert quantized.input_scale.shape == (6,)
        plain = quantize_(copy.deepcopy(conv), scheme, calibration=images)
        assert output_loss(conv, quantized, images) < 0.6 * output_loss(conv, plain, images)
