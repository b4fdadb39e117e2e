"""Names of methods: parts joined by +, what they need, what they refuse."""

import itertools
import warnings

import pytest
import torch
from calibration_data import correlated, linear
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import METHODS, Rule, Scheme, get_method, quantize_
from rlquant.quant.clip import clip
from rlquant.quant.gptq import gptq
from rlquant.quant.nearest import round_to_nearest

RULES = [name for name, part in METHODS.items() if isinstance(part, Rule)]


def net() -> nn.Sequential:
    return nn.Sequential(linear(8, 16), nn.ReLU(), linear(16, 3, 1))


def test_parts_and_defaults() -> None:
    assert get_method("bias").rule.choose is round_to_nearest
    assert get_method("awq").rule.choose is clip
    assert get_method("awq+gptq").rule.choose is gptq
    assert len(get_method("cle+awq+outlier+gptq+bias").transforms) == 3
    assert len(get_method("gptq+bias").finishers) == 1


def test_what_needs_calibration() -> None:
    without = {name for name in METHODS if not get_method(name).needs_calibration}
    assert without == {"rtn", "mse", "hqq", "cle"}
    for name in without:
        quantize_(net(), "int4", method=name)
    with pytest.raises(InputError, match=r"method 'gptq\+bias' needs calibration data"):
        quantize_(net(), "int4", method="gptq+bias")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gtpq", r"unknown method 'gtpq'. Did you mean 'gptq'\? Choices: rtn, mse,"),
        ("gptq+bais", r"unknown method 'bais'. Did you mean 'bias'\?"),
        ("gptq+", "unknown method ''"),
        ("gptq+hqq", r"several rules for choosing codes: keep one of gptq, hqq"),
        ("bias+gptq+bias", "names a part twice"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_method(name)


@pytest.mark.parametrize(
    ("method", "scheme", "message"),
    [
        ("smoothquant", "int4", r"'smoothquant' cannot do int4; these can: rtn, mse, clip, hqq, gptq, cle, awq,"),
        ("hqq+bias", "bf16", "'hqq' cannot do bf16; these can: rtn, gptq, cle, bias"),
        ("awq", "fp16", "'awq' cannot do fp16"),
    ],
)  # fmt: skip
def test_schemes_that_a_method_cannot_do(method: str, scheme: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_(net(), scheme, method=method, calibration=correlated(50, 8))
    with pytest.raises(InputError, match=message):
        get_method(method).check(Scheme.parse(scheme))


@pytest.mark.parametrize(
    "scheme", ["int3", "w4a8-g5-asym", "w8a6-dynamic", "nf4", "fp8_e5m2", "bf16", "fp32"]
)
def test_every_combination_works_or_is_refused(scheme: str) -> None:
    x = correlated(80, 8)
    expected = net()(x)
    transforms = ["", "cle+", "smoothquant+", "awq+", "outlier+", "awq+outlier+", "cle+smoothquant+outlier+"]
    worked = 0
    for transform, rule, finish in itertools.product(transforms, RULES, ["", "+bias"]):
        name = transform + rule + finish
        try:
            get_method(name).check(Scheme.parse(scheme))
        except InputError:
            if scheme != "fp32":
                continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            quantized = quantize_(net(), scheme, method=name, calibration=x)
        error = (quantized(x) - expected).square().mean() / expected.square().mean()
        assert error < (0.15 if "3" in scheme else 0.05), name
        worked += 1
    assert worked >= 8


def test_empty_batches_are_as_no_calibration() -> None:
    with pytest.raises(InputError, match="calibration holds no batch"):
        quantize_(net(), "int4", method="gptq", calibration=[])
    with pytest.warns(UserWarning, match="calibration never reached it"):
        quantized = quantize_(net(), "int4", method="gptq", calibration=torch.empty(0, 8))
    assert torch.equal(quantized[0].packed.codes, quantize_(net(), "int4")[0].packed.codes)
