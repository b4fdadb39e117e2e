"""Calibration that says little and groups that do not divide: every method copes and says what it did."""

import copy
import warnings

import pytest
import torch
from calibration_data import correlated, linear, output_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import METHODS, CalibrationWarning, get_method, quantize_, size_table, weight_bytes

NAMES = [*METHODS, "awq+gptq", "outlier+cle+gptq", "smoothquant+outlier+gptq+bias"]


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return linear(8, 4) if kind == "linear" else nn.Conv2d(4, 6, 3, padding=1)


def scheme_for(method: str, weight_only: str, both: str) -> str:
    return both if "smoothquant" in method else weight_only


def quietly(module: nn.Module, scheme: str, method: str, calibration: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return quantize_(copy.deepcopy(module), scheme, method=method, calibration=calibration)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(NAMES), st.sampled_from(["linear", "conv"]), st.sampled_from(["int4", "w4a8", "w4a8-dynamic"]),
    st.sampled_from([0.0, 1.0, -3.0, 1e-20, 1e6]), st.integers(1, 5),
)  # fmt: skip
def test_constant_activations_give_a_layer_of_much_the_same_output(
    method: str, kind: str, scheme: str, constant: float, count: int
) -> None:
    layer = layer_of(kind)
    x = torch.full((count, 8) if kind == "linear" else (count, 4, 5, 5), constant)
    quantized = quietly(layer, scheme_for(method, scheme, "w4a8"), method, x)
    out, expected = quantized(x), layer(x)
    assert out.isfinite().all()
    # What rounding 4-bit weights alone may cost: half a step for each of the inputs.
    step = float(layer.weight.detach().abs().max()) / 7
    largest = float(expected.detach().abs().max())
    bound = 0.5 * step * abs(constant) * layer.weight[0].numel() + 1e-5 + 1e-2 * largest
    assert (out - expected).abs().max() <= bound
    fresh = torch.rand(x.shape)
    assert quantized(fresh).isfinite().all()


@pytest.mark.parametrize("method", NAMES)
def test_empty_activations_are_as_if_a_layer_was_never_reached(method: str) -> None:
    layer, nothing = layer_of("linear"), torch.empty(0, 8)
    if "smoothquant" in method:
        with pytest.raises(InputError, match="calibration never reached layer"):
            quantize_(layer, "w4a8", method=method, calibration=nothing)
        return
    if get_method(method).rule.needs_inputs:
        with pytest.warns(
            CalibrationWarning, match="calibration never reached it, so it is rounded to nearest"
        ):
            quantized = quantize_(copy.deepcopy(layer), "int4", method=method, calibration=nothing)
        expected = quantize_(copy.deepcopy(layer), "int4")
    else:
        quantized = quietly(layer, "int4", method, nothing)
        expected = quietly(layer, "int4", get_rule(method), None)
    assert torch.equal(quantized.weight, expected.weight)
    assert torch.equal(quantized.bias, layer.bias)


def get_rule(method: str) -> str:
    """The rule that a method leaves in place where it has seen nothing."""
    return method if get_method(method).rule is METHODS.get(method) else "rtn"


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(1, 39), st.integers(0, 99))
def test_a_hessian_of_too_few_rows_is_damped_by_the_shortage_and_says_so(
    columns: int, rows: int, seed: int
) -> None:
    layer, x = linear(columns, 3, seed), correlated(rows, columns, seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = quantize_(copy.deepcopy(layer), "int4", method="gptq", calibration=x)
    said = [str(each.message) for each in caught if issubclass(each.category, CalibrationWarning)]
    if rows >= columns:
        assert said == []
    else:
        raised = f"damping is raised from 0.01 to {min(1.0, 0.01 * columns / rows):.2g}"
        assert any(f"{rows} calibration rows" in each and raised in each for each in said)
    assert quantized.weight.isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["rtn", "mse", "clip", "hqq", "gptq", "awq+gptq"]), st.sampled_from(["linear", "conv"]),
    st.integers(1, 12), st.integers(2, 4), st.booleans(),
)  # fmt: skip
def test_groups_that_do_not_divide_are_exact_in_every_method(
    method: str, kind: str, group: int, bits: int, asymmetric: bool
) -> None:
    layer = layer_of(kind)
    x = correlated(60, 8) if kind == "linear" else torch.randn(6, 4, 5, 5)
    scheme = f"int{bits}-g{group}" + ("-asym" if asymmetric else "")
    quantized = quietly(layer, scheme, method, x)
    rows, columns = quantized.weight.flatten(1).shape
    groups = -(-columns // group)
    assert quantized.packed.scale.shape == (rows, groups)
    (row,) = size_table(quantized)
    scaled = quantized.input_scale is not None
    assert row.codes == -(-rows * columns * bits // 8)  # no byte for padding
    assert row.scales == 4 * rows * groups + (4 * layer.weight.shape[1] if scaled else 0)
    assert row.zero_points == (-(-rows * groups * bits // 8) if asymmetric else 0)
    assert row.total == weight_bytes(quantized)
    codes, qparams = quantized.packed.unpacked().flatten(1), quantized.packed.qparams()
    spread = qparams.scale.repeat_interleave(group, dim=1)[:, :columns]
    if asymmetric:
        grid = codes - qparams.zero_point.repeat_interleave(group, dim=1)[:, :columns]
    else:
        grid = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes)
    torch.testing.assert_close(quantized.weight.flatten(1), grid * spread)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("scheme", ["int3-g5", "int3-g5-asym", "nf4-g5"])
def test_a_short_group_is_what_its_columns_are_alone(method: str, scheme: str) -> None:
    layer, last = linear(12, 6, bias=False), linear(2, 6, bias=False)
    with torch.no_grad():
        last.weight.copy_(layer.weight[:, 10:])
    alone = quantize_(last, scheme.replace("-g5", "-channel"), method=method)
    assert torch.equal(quantize_(layer, scheme, method=method).weight[:, 10:], alone.weight)


@pytest.mark.parametrize("rows", [10, 20, 40])
def test_few_rows_still_beat_nearest_on_inputs_they_have_not_seen(rows: int) -> None:
    layer = linear(40, 16)
    seen, unseen = correlated(rows + 500, 40).split([rows, 500])
    gptq, nearest = (quietly(layer, "int3", method, seen) for method in ("gptq", "rtn"))
    assert output_loss(layer, gptq, unseen) < 0.25 * output_loss(layer, nearest, unseen)
