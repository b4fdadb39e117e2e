"""Gradients of the learned grid against the papers' equations, torch's own operators and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlquant.quant import get_format, prepare_qat_, unsigned
from rlquant.quant.lsq import LearnedActivation, learned_fake_quantize


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_the_paper(
    x: list[float], upstream: list[float], scale: float, low: int, high: int
) -> tuple[float, list[float]]:
    """Esser et al. 2020, equations 3 and 5, one value at a time in float64."""
    to_scale, to_x = 0.0, []
    for value, grad in zip(x, upstream, strict=True):
        v = value / scale
        if v < low:
            local, passes = float(low), 0.0
        elif v > high:
            local, passes = float(high), 0.0
        else:
            local, passes = -v + round(v), 1.0  # Python rounds half to even, as torch does
        to_scale += grad * local
        to_x.append(grad * passes)
    return to_scale, to_x


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("scale", [0.07, 0.4, 1.3])
def test_weight_gradients_follow_equation_3(bits: int, scale: float) -> None:
    x, upstream = seeded(200) * 2, seeded(200, seed=1)
    fmt = get_format(f"int{bits}")
    high = 2 ** (bits - 1) - 1
    parameter, learned = x.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
    learned_fake_quantize(parameter, learned, None, fmt).backward(upstream)
    # The scale as the code has it, in float32, or values near a tie fall on the other side.
    expected, to_x = by_the_paper(x.tolist(), upstream.tolist(), learned.item(), -high, high)
    assert learned.grad is not None
    assert learned.grad.item() == pytest.approx(expected, rel=1e-4, abs=2e-3)
    torch.testing.assert_close(parameter.grad, torch.tensor(to_x))


@given(st.integers(2, 8), st.floats(0.02, 2.0), st.floats(0.0, 1.0), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_activations_agree_with_torchs_learnable_operator(
    bits: int, scale: float, share: float, seed: int
) -> None:
    """torch's operator passes the gradient of half a step beyond the grid; the papers do not: keep clear of it."""
    high = 2**bits - 1
    zero = float(round(share * high))
    grid = torch.randint(-high, 2 * high, (300,), generator=torch.Generator().manual_seed(seed)) - zero
    inside = (grid >= -zero) & (grid <= high - zero)
    nudge = torch.rand(300, generator=torch.Generator().manual_seed(seed)) * 0.4
    # Inside, any residue but toward the outside at the two ends; outside, residues away from the half step.
    toward = torch.where(grid == high - zero, -1.0, 1.0)
    x = torch.where(inside, grid + toward * nudge, grid + torch.sign(grid) * (0.6 + nudge / 2)) * scale
    upstream = seeded(300, seed=seed + 1)
    ours = [t.clone().requires_grad_() for t in (x, torch.tensor(scale), torch.tensor(zero))]
    out = learned_fake_quantize(ours[0], ours[1], ours[2], unsigned(bits))
    out.backward(upstream)
    theirs = [x.clone().requires_grad_()] + [torch.tensor([v], requires_grad=True) for v in (scale, zero)]
    expected = torch._fake_quantize_learnable_per_tensor_affine(*theirs, 0, high, 1.0)
    expected.backward(upstream)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine.grad.view(1), other.grad, rtol=1e-3, atol=1e-2 * max(1.0, scale))


@pytest.mark.parametrize("name", ["int2", "int4", "int4-asym", "int8", "int5-g7-asym"])
def test_weights_pass_the_gradient_of_torchs_straight_through_estimator(name: str) -> None:
    torch.manual_seed(0)
    float_layer = torch.nn.Linear(12, 5)
    layer = prepare_qat_(float_layer, name, observer="mean_abs")
    learned = layer.get_submodule("packed")
    learned.cached().backward(seeded(5, 12, seed=2))
    qparams, fmt = learned.qparams(), learned.fmt
    columns = range(12)
    size = learned.scheme.granularity.group_size or 12
    low, high = (0, int(fmt.max)) if qparams.zero_point is not None else (-int(fmt.max), int(fmt.max))
    for column in columns:
        group = column // size
        weight = float_layer.weight.detach()[:, column : column + 1].clone().requires_grad_()
        scale = qparams.scale[:, group]
        zero = torch.zeros(5) if qparams.zero_point is None else qparams.zero_point[:, group].float()
        expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, low, high)
        expected.backward(seeded(5, 12, seed=2)[:, column : column + 1])
        torch.testing.assert_close(learned.cached()[:, column : column + 1], expected, rtol=0, atol=0)
        v = weight.detach()[:, 0] / scale + zero
        past = torch.maximum(low - v, v - high)  # steps beyond the grid; at 0 rounding decides
        beyond, agreed = (past > 1e-4) & (past < 0.5), (past < -1e-4) | (past > 0.5)
        found = float_layer.weight.grad[:, column]
        torch.testing.assert_close(found[agreed], weight.grad[agreed, 0])
        assert not found[beyond].any()


@pytest.mark.parametrize("zero_point", [0.0, 3.0, 7.0])
def test_clipped_values_pull_as_finite_differences_do(zero_point: float) -> None:
    """Where everything clips, the output is linear in scale and zero point, so differences are exact."""
    x = torch.tensor([-50.0, -80.0, 60.0, 90.0], dtype=torch.float64)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)

    def loss(scale: float, zero: float) -> float:
        grid = [min(max(round(v / scale) + zero, 0), 7) - zero for v in x.tolist()]
        return sum(w * g * scale for w, g in zip(weights.tolist(), grid, strict=True))

    scale, zero = (torch.tensor(v, requires_grad=True) for v in (0.5, zero_point))
    learned_fake_quantize(x.float(), scale, zero, unsigned(3)).backward(weights.float())
    assert scale.grad.item() == pytest.approx(
        (loss(0.51, zero_point) - loss(0.49, zero_point)) / 0.02, rel=1e-5
    )
    step = (loss(0.5, zero_point + 1) - loss(0.5, zero_point - 1)) / 2
    assert zero.grad.item() == pytest.approx(step, rel=1e-5)


def test_the_zeros_of_a_relu_pull_on_no_zero_point() -> None:
    zero = torch.zeros((), requires_grad=True)
    x = torch.relu(seeded(100))
    learned_fake_quantize(x, torch.tensor(1.0), zero, unsigned(4)).backward(torch.ones(100))
    assert zero.grad == 0


@pytest.mark.parametrize(("name", "sharing"), [("int4", 12), ("int4-tensor", 60), ("int4-g4", 4)])
def test_weight_scales_are_damped_by_their_share(name: str, sharing: int) -> None:
    torch.manual_seed(0)
    layer = prepare_qat_(torch.nn.Linear(12, 5), name, observer="mean_abs")
    learned, upstream = layer.get_submodule("packed"), seeded(5, 12, seed=3)
    learned.log_scale.data -= 0.07  # no weight exactly at the end of its grid, where rounding decides
    learned.cached().backward(upstream)
    scale = learned.qparams().scale
    found = (learned.log_scale.grad / scale).flatten().tolist()  # d loss / d scale
    columns = 12 if name != "int4-g4" else 4
    blocks = learned.weight.detach().reshape(-1, columns), upstream.reshape(-1, columns)
    if name == "int4-tensor":
        blocks = blocks[0].reshape(1, -1), blocks[1].reshape(1, -1)
    for block, grads, s, value in zip(*blocks, scale.flatten().tolist(), found, strict=True):
        expected, _ = by_the_paper(block.tolist(), grads.tolist(), s, -7, 7)
        assert value == pytest.approx(expected / math.sqrt(sharing * 7), rel=1e-3, abs=1e-4)


def test_activation_gradients_are_damped_by_the_features_of_one_sample() -> None:
    x, upstream = seeded(32, 10).abs(), seeded(32, 10, seed=1)
    learned = LearnedActivation(unsigned(3))
    learned(x)
    learned.log_scale.data -= 0.5
    learned(x).backward(upstream)
    scale = learned.qparams().scale.item()
    expected, _ = by_the_paper(x.flatten().tolist(), upstream.flatten().tolist(), scale, 0, 7)
    assert learned.log_scale.grad.item() / scale == pytest.approx(expected / math.sqrt(10 * 7), rel=1e-3)
