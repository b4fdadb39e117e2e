"""Affine maps against torch's fake quantization, a literal loop, and the properties they promise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlquant.errors import InputError
from rlquant.quant import (
    Granularity,
    QParams,
    QuantizedWeight,
    Scheme,
    dequantize,
    fake_quantize,
    get_format,
    qparams_from_range,
    quantize,
    sqnr_db,
    unsigned,
    weight_qparams,
)

BITS = range(2, 17)
matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 40)),
    elements=st.floats(-1e6, 1e6, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32),
)
ranges = st.tuples(st.floats(-1e6, 0, width=32), st.floats(0, 1e6, width=32))


def half_step(scale: torch.Tensor, levels: float) -> torch.Tensor:
    """Half a step, plus what rounding 1 / scale and its product to float32 can add."""
    return scale * (0.5 + levels * 2.0**-22)


@pytest.mark.parametrize("asymmetric", [False, True])
@given(x=matrices, bits=st.sampled_from(BITS))
def test_round_trip_within_half_a_step(asymmetric: bool, x: np.ndarray, bits: int) -> None:
    weight = torch.from_numpy(x)
    fmt = unsigned(bits) if asymmetric else get_format(f"int{bits}")
    qparams = weight_qparams(weight, fmt, Granularity("channel"))
    codes = quantize(weight, qparams, fmt)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    error = (dequantize(codes, qparams, fmt) - weight).abs()
    assert (error <= half_step(qparams.scale, 2**bits)).all()


@given(bounds=ranges, bits=st.sampled_from(BITS))
def test_zero_is_exact_in_asymmetric_maps(bounds: tuple[float, float], bits: int) -> None:
    low, high = (torch.tensor(side) for side in bounds)
    qparams = qparams_from_range(low, high, unsigned(bits))
    assert qparams.zero_point is not None
    assert 0 <= int(qparams.zero_point) <= 2**bits - 1
    zero = torch.zeros(3)
    assert torch.equal(fake_quantize(zero, qparams, unsigned(bits)), zero)


@given(low=st.floats(0.5, 1e6, width=32), span=st.floats(0, 1e6, width=32), bits=st.sampled_from(BITS))
def test_zero_is_exact_even_where_the_data_never_comes_near_it(low: float, span: float, bits: int) -> None:
    for bounds in ((low, low + span), (-low - span, -low)):
        qparams = qparams_from_range(torch.tensor(bounds[0]), torch.tensor(bounds[1]), unsigned(bits))
        assert float(fake_quantize(torch.zeros(()), qparams, unsigned(bits))) == 0.0
        ends = torch.tensor(bounds)
        error = (fake_quantize(ends, qparams, unsigned(bits)) - ends).abs()
        assert (error <= half_step(qparams.scale, 2**bits)).all()


@pytest.mark.parametrize("bits", BITS)
def test_uniform_data_gains_six_decibels_a_bit(bits: int) -> None:
    x = torch.rand(1, 2**17, generator=torch.Generator().manual_seed(bits)) * 2 - 1
    for fmt, steps in ((get_format(f"int{bits}"), 2**bits - 2), (unsigned(bits), 2**bits - 1)):
        qparams = weight_qparams(x, fmt, Granularity("tensor"))
        # Signal 1/3, noise step^2 / 12, step 2 / steps: the ratio is steps^2, 6.02 dB for each doubling.
        assert sqnr_db(x, fake_quantize(x, qparams, fmt)) == pytest.approx(20 * math.log10(steps), abs=0.15)


def test_the_slope_is_6_02_decibels() -> None:
    x = torch.rand(1, 2**18, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decibels = []
    for bits in range(6, 13):
        qparams = weight_qparams(x, unsigned(bits), Granularity("tensor"))
        decibels.append(sqnr_db(x, fake_quantize(x, qparams, unsigned(bits))))
    slope = np.polyfit(range(6, 13), decibels, 1)[0]
    assert slope == pytest.approx(6.02, abs=0.08)


@given(x=matrices, bits=st.integers(2, 8), n=st.integers(1, 50), asymmetric=st.booleans())
def test_a_group_steps_no_wider_than_its_channel(x: np.ndarray, bits: int, n: int, asymmetric: bool) -> None:
    weight = torch.from_numpy(x)
    fmt = unsigned(bits) if asymmetric else get_format(f"int{bits}")
    group = Granularity("group", n)
    fine = weight_qparams(weight, fmt, group)
    coarse = weight_qparams(weight, fmt, Granularity("channel"))
    columns = weight.shape[1]
    for index in range(fine.scale.shape[1]):
        in_use = (weight[:, index * n : (index + 1) * n] != 0).any(dim=1)  # an all-zero group has scale 1
        assert (fine.scale[in_use, index] <= coarse.scale[in_use, 0]).all()
    spread = QParams(
        group.expand(fine.scale, columns),
        None if fine.zero_point is None else group.expand(fine.zero_point, columns),
    )
    error = (fake_quantize(weight, spread, fmt) - weight).abs()
    assert (error <= half_step(coarse.scale, 2**bits)).all()


@given(x=matrices, bits=st.integers(2, 6), n=st.integers(1, 50), asymmetric=st.booleans())
def test_groups_never_worsen_the_squared_error_of_their_channel_under_mse(
    x: np.ndarray, bits: int, n: int, asymmetric: bool
) -> None:
    weight = torch.from_numpy(x)
    suffix = "-asym" if asymmetric else ""
    errors = []
    for granularity in ("-channel", f"-g{n}"):
        scheme = Scheme.parse(f"int{bits}{granularity}{suffix}-mse")
        difference = QuantizedWeight.from_float(weight, scheme).dequantize().double() - weight.double()
        errors.append(difference.square().sum(dim=1))
    assert (errors[1] <= errors[0] * (1 + 1e-5) + 1e-30).all()


def literal_quantize(x: np.ndarray, scale: float, zero_point: int, low: int, high: int) -> list[int]:
    codes = []
    for value in x.astype(np.float32):
        inverse = np.float32(1.0) / np.float32(scale)
        code = round(float(np.float32(value * inverse))) + zero_point  # Python rounds half to even
        codes.append(min(max(code, low), high))
    return codes


@given(
    x=hnp.arrays(np.float32, 20, elements=st.floats(-100, 100, width=32)),
    scale=st.floats(2.0**-10, 10, width=32),
    bits=st.integers(2, 8),
    data=st.data(),
)
def test_codes_equal_a_literal_loop(x: np.ndarray, scale: float, bits: int, data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(0, 2**bits - 1))
    qparams = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))
    codes = quantize(torch.from_numpy(x), qparams, unsigned(bits))
    assert codes.tolist() == literal_quantize(x, scale, zero_point, 0, 2**bits - 1)
    symmetric = quantize(torch.from_numpy(x), QParams(torch.tensor(scale)), get_format(f"int{bits}"))
    limit = 2 ** (bits - 1) - 1
    expected = literal_quantize(x, scale, 0, -limit, limit)
    assert symmetric.tolist() == [code % 2**bits for code in expected]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_fake_quantize_equals_torchs_to_the_bit(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(64, 33, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    fmt = unsigned(bits)
    qparams = weight_qparams(x, fmt, Granularity("tensor"))
    assert qparams.zero_point is not None
    expected = torch.fake_quantize_per_tensor_affine(
        x, float(qparams.scale), int(qparams.zero_point), 0, 2**bits - 1
    )
    assert torch.equal(fake_quantize(x, qparams, fmt), expected)
    qparams = weight_qparams(x, fmt, Granularity("channel"))
    assert qparams.zero_point is not None
    expected = torch.fake_quantize_per_channel_affine(
        x, qparams.scale[:, 0], qparams.zero_point[:, 0], 0, 0, 2**bits - 1
    )
    assert torch.equal(fake_quantize(x, qparams, fmt), expected)


@pytest.mark.parametrize("name", ["int4", "int8", "fp8_e4m3", "fp4_e2m1", "nf4"])
def test_symmetric_maps_are_odd(name: str) -> None:
    fmt = get_format(name)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    qparams = weight_qparams(x, fmt, Granularity("channel"))
    if name != "nf4":  # the NF4 table itself is not symmetric
        assert torch.equal(fake_quantize(-x, qparams, fmt), -fake_quantize(x, qparams, fmt))
    assert torch.equal(fake_quantize(x, qparams, fmt), dequantize(quantize(x, qparams, fmt), qparams, fmt))
    largest = fake_quantize(x, qparams, fmt).abs().amax(dim=1)
    assert torch.allclose(largest, x.abs().amax(dim=1))


@pytest.mark.parametrize("fmt", [get_format("int4"), unsigned(4), get_format("nf4"), get_format("fp8_e5m2")])
def test_zero_and_constant_tensors(fmt) -> None:  # type: ignore[no-untyped-def]
    for value in (0.0, 3.7, -3.7, 1e-42):
        x = torch.full((2, 5), value)
        qparams = weight_qparams(x, fmt, Granularity("channel"))
        assert (qparams.scale > 0).all()
        assert torch.allclose(fake_quantize(x, qparams, fmt), x, rtol=1e-6, atol=1e-38)


def test_ranges_wider_than_float32_do_not_overflow() -> None:
    x = torch.tensor([[-3e38, 3e38, 0.0]])
    qparams = weight_qparams(x, unsigned(8), Granularity("channel"))
    assert torch.allclose(fake_quantize(x, qparams, unsigned(8)), x, rtol=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="the weight holds NaN or Inf"):
        weight_qparams(torch.tensor([[0.0, bad]]), get_format("int8"), Granularity("channel"))
