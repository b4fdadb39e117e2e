"""Moments of a layer's inputs against NumPy, whatever the batches and however far the mean is from zero."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rlquant.quant import InputMoments
from rlquant.quant.kinds import input_rows


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(2, 60), st.integers(1, 6), st.booleans(), st.floats(-100, 100),
    st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_moments_are_numpys(
    blocks: int, n: int, columns: int, centered: bool, offset: float, drifted: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(blocks, n, columns, generator=g) + offset
    reference = 0.9 * rows + 0.5 * torch.randn(blocks, n, columns, generator=g) if drifted else None
    moments = InputMoments(gram=True, centered=centered, sample=5)
    cut = n // 3
    for part in (slice(0, cut), slice(cut, n)):
        moments.add(rows[:, part], None if reference is None else reference[:, part])
    q = rows.double().numpy()
    f = q if reference is None else reference.double().numpy()
    scale = max(1.0, abs(offset))
    np.testing.assert_allclose(moments.mean.numpy(), q.mean(1), atol=1e-5 * scale)
    np.testing.assert_allclose(moments.reference_mean.numpy(), f.mean(1), atol=1e-5 * scale)
    np.testing.assert_allclose(moments.abs_mean.numpy(), np.abs(q).mean(1), atol=1e-5 * scale)
    np.testing.assert_allclose(moments.square_mean.numpy(), np.square(q).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(moments.abs_max.numpy(), np.abs(q).max(1))
    q_middle = q.mean(1, keepdims=True) if centered else 0.0
    f_middle = f.mean(1, keepdims=True) if centered else 0.0
    a = q - q_middle
    tolerance = 1e-4 if centered else 1e-5 * scale**2  # centred moments stay exact far from zero
    np.testing.assert_allclose(moments.gram.numpy(), a.transpose(0, 2, 1) @ a / n, atol=tolerance)
    if drifted:
        d = (f - f_middle) - a
        assert moments.drift is not None
        np.testing.assert_allclose(moments.drift.numpy(), d.transpose(0, 2, 1) @ a / n, atol=1e-4 * scale)
    else:
        assert moments.drift is None
    assert moments.rows.shape == (blocks, min(5, n), columns)
    one = moments.block(blocks - 1)
    torch.testing.assert_close(one.gram[0], moments.gram[-1])
    torch.testing.assert_close(one.rows[0], moments.rows[-1])


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 3}, {"groups": 3, "dilation": 2},
                                     {"padding": "same", "padding_mode": "circular"}])  # fmt: skip
def test_rows_of_a_convolution_times_its_weight_are_its_output(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, (3, 2), bias=False, **options)  # type: ignore[arg-type]
    images = torch.randn(4, 3, 9, 8)
    (rows,) = input_rows(layer, images)
    blocks = layer.weight.view(layer.groups, 6 // layer.groups, -1)
    out = layer(images)
    expected = out.flatten(2).permute(1, 0, 2).reshape(layer.groups, 6 // layer.groups, -1)
    torch.testing.assert_close(blocks @ rows.transpose(1, 2), expected, atol=1e-5, rtol=1e-4)


def test_rows_of_a_linear_layer() -> None:
    x = torch.randn(2, 3, 5)
    (rows,) = input_rows(nn.Linear(5, 2), x)
    assert torch.equal(rows, x.reshape(1, 6, 5))
    assert torch.equal(F.linear(rows, torch.eye(5)), rows)


def test_products_of_many_columns_are_symmetric_and_whole() -> None:
    x = torch.randn(40, 1300, generator=torch.Generator().manual_seed(0)) + 1.0
    moments = InputMoments(gram=True)
    for part in x.split(13):
        moments.add(part[None])
    expected = x.double().numpy().T @ x.double().numpy() / 40
    np.testing.assert_allclose(moments.gram[0].numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(moments.gram[0].numpy(), moments.gram[0].numpy().T, rtol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_moments_on_a_gpu_are_numpys(offset: float) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 4000, 700, generator=g) * torch.logspace(-2, 2, 700) + offset
    reference = rows + 0.1 * torch.randn(1, 4000, 700, generator=g)
    moments = InputMoments(gram=True, centered=True)
    for part, other in zip(rows.cuda().split(1000, dim=1), reference.cuda().split(1000, dim=1), strict=True):
        moments.add(part, other)
    x = rows[0].double().numpy()
    a = x - x.mean(0)
    size = np.sqrt(np.outer(np.square(a).mean(0), np.square(a).mean(0)))
    # Sums of 1,000 float32 products: some 3.5e-6 where a kernel adds them up one by one, and 1e-3 in TF32.
    assert (np.abs(moments.gram[0].cpu().numpy() - a.T @ a / 4000) / size).max() < 1e-5
    d = (reference[0].double().numpy() - x) - (reference[0].double().numpy() - x).mean(0)
    drift = moments.drift
    assert drift is not None
    expected = d.T @ a / 4000
    scale = np.outer(np.square(d).mean(0) ** 0.5, np.square(a).mean(0) ** 0.5)
    assert (np.abs(drift[0].cpu().numpy() - expected) / scale).max() < 1e-5
