"""The outlier split against LLM.int8's decomposition, written out."""

import copy
import math

import pytest
import torch
from calibration_data import correlated, linear, loss_of
from torch import nn
from torch.nn import functional as F

from rlquant.errors import InputError
from rlquant.quant import prepare_empty_, quantize_, size_table, weight_bytes


def loud(rows: int = 500, columns: int = 100) -> torch.Tensor:
    """Inputs with one channel in fifty 40 times as loud."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[:, [7, 60]] *= 40.0
    return x


@pytest.mark.parametrize("scheme", ["int4", "w8a8", "w4a8-g16-asym", "w8a8-dynamic", "nf4"])
def test_the_output_is_the_sum_of_both_parts(scheme: str) -> None:
    x, layer = loud(), linear(100, 12)
    quantized = quantize_(copy.deepcopy(layer), scheme, method="outlier", calibration=x)
    assert quantized.outlier_index.tolist() == [7, 60]
    rest, outliers = x.clone(), torch.zeros_like(x)
    rest[:, [7, 60]] = 0.0
    outliers[:, [7, 60]] = x[:, [7, 60]]
    half = layer.weight.detach().half().float()
    expected = F.linear(quantized.input_quant(rest), quantized.packed.dequantize(), layer.bias)
    expected = expected + F.linear(outliers, half)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-5)
    assert not quantized.weight[:, [7, 60]].any()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("method", ["outlier", "outlier+gptq", "outlier+hqq+bias"])
def test_the_grid_of_the_inputs_need_not_cover_the_outliers(scheme: str, method: str) -> None:
    assert loss_of(linear(100, 12), scheme, method, loud()) < 0.02 * loss_of(
        linear(100, 12), scheme, "rtn", loud()
    )


def test_bytes_are_counted_and_stored() -> None:
    layer = linear(100, 12)
    plain = quantize_(copy.deepcopy(layer), "int4")
    quantized = quantize_(copy.deepcopy(layer), "int4", method="outlier", calibration=loud())
    extra = 2 * (12 * 2 + 4)  # two channels: float16 weights and int32 indices
    assert weight_bytes(quantized) == weight_bytes(plain) + extra
    assert weight_bytes(quantized) == sum(
        t.numel() * t.element_size() for t in quantized.state_dict().values()
    )
    (row,) = size_table(quantized)
    assert row.codes == 12 * 100 // 2 + extra
    assert row.total == weight_bytes(quantized)


@pytest.mark.parametrize("inputs", [1, 4, 64, 65, 256])
def test_a_share_of_the_channels_and_at_least_one(inputs: int) -> None:
    quantized = quantize_(linear(inputs, 3), "int4", method="outlier", calibration=correlated(50, inputs))
    assert len(quantized.outlier_index) == math.ceil(inputs / 64)


def test_image_channels() -> None:
    torch.manual_seed(0)
    images = torch.rand(20, 5, 8, 8)
    images[:, 3] *= 50.0
    conv = nn.Conv2d(5, 6, 3, padding=1, stride=2)
    quantized = quantize_(copy.deepcopy(conv), "w8a8", method="outlier", calibration=images)
    assert quantized.outlier_index.tolist() == [3]
    assert quantized.outlier_weight.shape == (6, 1, 3, 3)
    assert (quantized(images) - conv(images)).abs().max() < 0.02
    assert loss_of(conv, "w8a8", "outlier", images) < 0.05 * loss_of(conv, "w8a8", "rtn", images)


@pytest.mark.parametrize("method", ["outlier", "awq", "smoothquant+outlier+gptq+bias"])
def test_extras_come_back_with_the_state_dict(method: str) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(linear(100, 12), nn.Tanh(), linear(12, 3, 1, bias=False))

    x = loud()
    saved = quantize_(net(), "w4a8", method=method, calibration=x)
    restored = prepare_empty_(net(), "w4a8")
    restored.load_state_dict(saved.state_dict())
    assert torch.equal(restored(x), saved(x))
    restored.load_state_dict(
        quantize_(net(), "w4a8", calibration=x).state_dict(), strict=not method.endswith("bias")
    )
    assert restored[0].outlier_index is None
    assert restored[0].input_scale is None


def test_an_outlier_beyond_float16_is_refused() -> None:
    layer = linear(10, 2)
    with torch.no_grad():
        layer.weight[0, 3] = 1e5
    with pytest.raises(InputError, match="an outlier weight of 100000 does not fit in float16"):
        quantize_(layer, "int8", method="outlier", calibration=correlated(20, 10))
