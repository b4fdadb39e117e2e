"""Every method on a Linear and on a Conv2d against its paper's equations in float64 NumPy."""

import copy
import itertools

import numpy as np
import paper
import pytest
import torch
from torch import nn

from rlquant.quant import quantize_

KINDS = ("linear", "conv")


def quantized(case: paper.Case, scheme: str, method: str) -> nn.Module:
    return quantize_(copy.deepcopy(case.layer), scheme, method=method, calibration=case.x)


def values(layer: nn.Module) -> paper.Floats:
    """The dequantized weight as a matrix."""
    return layer.weight.double().numpy().reshape(len(layer.weight), -1)


def assert_close(ours: paper.Floats, expected: paper.Floats) -> None:
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rtn(kind: str) -> None:
    case = paper.case(kind)
    assert_close(values(quantized(case, "int4", "rtn")), paper.nearest(case.weight, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_has_the_least_squared_error_of_all_clips(kind: str, bits: int) -> None:
    case = paper.case(kind)
    ours = values(quantized(case, f"int{bits}", "mse"))
    clips = [paper.nearest(case.weight, bits, share) for share in np.linspace(0.2, 1.0, 80)]
    least = np.min([np.square(each - case.weight).sum(axis=1) for each in clips], axis=0)
    np.testing.assert_allclose(np.square(ours - case.weight).sum(axis=1), least, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clip_has_the_least_output_error_of_all_clips(kind: str, bits: int) -> None:
    case = paper.case(kind)
    ours = values(quantized(case, f"int{bits}", "clip"))
    clips = [paper.nearest(case.weight, bits, share) for share in np.linspace(1.0, 0.2, 33)]
    least = np.min([paper.output_error(case.weight, each, case.rows) for each in clips], axis=0)
    np.testing.assert_allclose(paper.output_error(case.weight, ours, case.rows), least, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [5, 12])
def test_clip_searches_every_group_by_its_own_part_of_the_output(kind: str, group: int) -> None:
    case = paper.case(kind)
    ours = values(quantized(case, f"int3-g{group}", "clip"))
    for start in range(0, 12, group):
        part = slice(start, start + group)
        weight, rows = case.weight[:, part], case.rows[:, part]
        clips = [paper.nearest(weight, 3, share) for share in np.linspace(1.0, 0.2, 33)]
        least = np.min([paper.output_error(weight, each, rows) for each in clips], axis=0)
        np.testing.assert_allclose(paper.output_error(weight, ours[:, part], rows), least, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int4", "int3", "int4-asym", "int3-asym"])
def test_hqq_is_the_half_quadratic_alternation(kind: str, scheme: str) -> None:
    case = paper.case(kind)
    ours = quantized(case, scheme, "hqq")
    bits, symmetric = int(scheme[3]), "asym" not in scheme
    expected = [paper.half_quadratic(row, bits, symmetric) for row in case.weight]
    qparams = ours.packed.qparams()
    np.testing.assert_allclose(qparams.scale[:, 0].numpy(), [each[0] for each in expected], rtol=1e-5)
    if not symmetric:
        np.testing.assert_array_equal(qparams.zero_point[:, 0].numpy(), [each[1] for each in expected])
    assert_close(values(ours), np.stack([each[2] for each in expected]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "int3", "int3-g5", "int2-g4"])
def test_gptq_is_obq_in_act_order_at_the_best_of_eight_scales(kind: str, bias: bool, scheme: str) -> None:
    case = paper.case(kind, bias)
    ours = quantized(case, scheme, "gptq")
    limit = 2 ** (int(scheme[3]) - 1) - 1
    group = int(scheme.partition("-g")[2] or 12)
    plain = paper.hessian_of(case.rows, centred=bias)
    damped = plain + max(0.001, 0.01 * 12 / len(case.rows)) * np.diag(plain).mean() * np.eye(12)
    order = np.argsort(-np.diag(plain), kind="stable").tolist()
    expected = []
    for row in case.weight:
        full = np.concatenate(
            [np.full(len(part), np.abs(part).max()) for part in np.split(row, range(group, 12, group))]
        )
        tried = []
        for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3):
            scale = share * full / limit
            tried.append(paper.obq(row, damped, order, scale, limit) * scale)
        best = tried[int(paper.quadratic(row - np.stack(tried), damped).argmin())]
        rounded = np.clip(np.round(row / full * limit), -limit, limit) * full / limit
        pair = np.stack([best, rounded])
        expected.append(pair[int(paper.quadratic(row - pair, plain).argmin())])
    assert_close(values(ours), np.stack(expected))
    if bias:
        before = case.layer.bias.detach().double().numpy()
        shift = (case.weight - values(ours)) @ case.rows.mean(axis=0)
        np.testing.assert_allclose(ours.bias.double().numpy(), before + shift, atol=1e-5)


def searched_scale(case: paper.Case, candidates: list[paper.Floats], bits: int, levels: int) -> paper.Floats:
    """The factors of least output error, weights rounded to nearest and inputs to ``levels`` (0: not)."""
    per_channel = case.weight.shape[1] // case.channels
    losses = []
    for factors in candidates:
        columns = np.repeat(factors / factors.min(), per_channel)
        entering = case.rows / columns
        if levels:
            entering = paper.on_grid(entering, *paper.grid(entering.min(), entering.max(), levels), levels)
        output = entering @ paper.nearest(case.weight * columns, bits).T
        losses.append(np.square(output - case.rows @ case.weight.T).sum())
    best = candidates[int(np.argmin(losses))]
    return best / best.min()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4])
def test_awq_takes_the_best_exponent_of_the_mean_magnitude_and_then_clips(kind: str, bits: int) -> None:
    case = paper.case(kind)
    magnitude = case.by_channel(np.abs(case.rows).mean(axis=0)).mean(axis=1)
    scale = searched_scale(case, [magnitude**alpha for alpha in np.linspace(0.0, 1.0, 21)], bits, 0)
    assert scale.max() > 1.0  # the case is one where scaling helps
    columns = np.repeat(scale, case.weight.shape[1] // case.channels)
    unclipped = quantized(case, f"int{bits}", "awq+rtn")
    np.testing.assert_allclose(1.0 / unclipped.input_scale.numpy(), scale, rtol=1e-4)
    assert_close(values(unclipped), paper.nearest(case.weight * columns, bits))
    clipped = quantized(case, f"int{bits}", "awq")
    clips = [paper.nearest(case.weight * columns, bits, share) for share in np.linspace(1.0, 0.2, 33)]
    least = np.min(
        [paper.output_error(case.weight * columns, each, case.rows / columns) for each in clips], axis=0
    )
    error = paper.output_error(case.weight * columns, values(clipped), case.rows / columns)
    np.testing.assert_allclose(error, least, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (8, 4), (4, 6)])
def test_smoothquant_takes_the_best_alpha_of_equation_4(kind: str, weights: int, activations: int) -> None:
    case = paper.case(kind)
    inputs = case.by_channel(np.abs(case.rows).max(axis=0)).max(axis=1)
    largest = case.by_channel(np.abs(case.weight)).max(axis=(0, 2))
    candidates = [np.ones(case.channels)]
    candidates += [inputs**alpha / largest ** (1 - alpha) for alpha in np.linspace(0.1, 0.9, 9)]
    scale = searched_scale(case, candidates, weights, 2**activations - 1)
    ours = quantized(case, f"w{weights}a{activations}", "smoothquant")
    np.testing.assert_allclose(1.0 / ours.input_scale.numpy(), scale, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_outlier_split_is_llm_int8s_integer_arithmetic(kind: str) -> None:
    """Section 3.2 in integers: int32 products of the rest, dequantized by both scales, plus a 16-bit product."""
    case = paper.case(kind)
    ours = quantized(case, "w8a8-dynamic", "outlier")
    size = case.by_channel(np.square(case.rows).mean(axis=0)).mean(axis=1) ** 0.5
    lengths = np.sqrt(np.square(case.by_channel(case.weight)).sum(axis=(0, 2)))
    outlier = int((size * lengths).argmax())
    assert ours.outlier_index.tolist() == [outlier]
    columns = np.repeat(np.arange(case.channels) == outlier, case.weight.shape[1] // case.channels)
    rest = np.where(columns, 0.0, case.weight)
    scale = np.abs(rest).max(axis=1) / 127
    codes = np.round(rest / scale[:, None]).astype(np.int64)
    inputs = np.where(columns, 0.0, case.rows)
    # LLM.int8 takes a range per token; a convolution's dynamic grid is one per image.
    tokens = inputs.reshape(len(case.x), -1, inputs.shape[1])
    low, high = tokens.min(axis=(1, 2), keepdims=True), tokens.max(axis=(1, 2), keepdims=True)
    step, zero = paper.grid(low, high, 255)
    integers = (np.clip(np.round(tokens / step) + zero, 0, 255) - zero).astype(np.int64)
    output = (integers @ codes.T) * step * scale
    half = case.weight[:, columns].astype(np.float16).astype(np.float64)
    output = output + tokens_of(case.rows[:, columns], len(case.x)) @ half.T
    output = output + case.layer.bias.detach().double().numpy()
    with torch.no_grad():
        result = ours(case.x).double().numpy()
    result = result.reshape(len(result), result.shape[1], -1).transpose(0, 2, 1)
    np.testing.assert_allclose(result, output, atol=2e-4)


def tokens_of(rows: paper.Floats, count: int) -> paper.Floats:
    return rows.reshape(count, -1, rows.shape[1])


@pytest.mark.parametrize("kind", KINDS)
def test_cle_sweeps_equation_11_until_nothing_moves(kind: str) -> None:
    torch.manual_seed(0)
    parts = {
        "linear": lambda a, b: nn.Linear(a, b),
        "conv": lambda a, b: nn.Conv2d(a, b, (2, 3)),
    }[kind]
    chain = nn.Sequential(parts(3, 5), nn.ReLU(), parts(5, 4), nn.ReLU(), parts(4, 6))
    with torch.no_grad():
        chain[0].weight.mul_(torch.logspace(-2, 2, 5).view(-1, *(1,) * (chain[0].weight.dim() - 1)))
    weights = [chain[i].weight.detach().double().numpy() for i in (0, 2, 4)]
    weights = [each.reshape(*each.shape[:2], -1) for each in weights]
    for _, (i, j) in itertools.product(range(50), ((0, 1), (1, 2))):
        first, second = np.abs(weights[i]).max(axis=(1, 2)), np.abs(weights[j]).max(axis=(0, 2))
        s = np.sqrt(first * second) / second  # equation 11, by which row i is divided
        weights[i], weights[j] = weights[i] / s[:, None, None], weights[j] * s[None, :, None]
    ours = quantize_(chain, "int16", method="cle")
    for i, expected in zip((0, 2, 4), weights, strict=True):
        restored = ours[i].weight.double().numpy().reshape(expected.shape)
        np.testing.assert_allclose(restored, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["int3", "w4a4"])
def test_bias_correction_is_the_mean_output_error(kind: str, scheme: str) -> None:
    case = paper.case(kind)
    ours = quantized(case, scheme, "bias")
    entering = case.rows
    if scheme == "w4a4":
        low, high = case.x.double().numpy().min(), case.x.double().numpy().max()
        entering = paper.on_grid(entering, *paper.grid(low, high, 15), 15)
    restored = paper.nearest(case.weight, int(scheme[1] if scheme == "w4a4" else scheme[3]))
    shift = case.weight @ case.rows.mean(axis=0) - restored @ entering.mean(axis=0)
    expected = case.layer.bias.detach().double().numpy() + shift
    np.testing.assert_allclose(ours.bias.double().numpy(), expected, atol=1e-5)
