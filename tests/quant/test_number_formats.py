"""Number formats against ml_dtypes, NumPy, torch's dtypes and bitsandbytes' published NF4 codes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlquant.errors import InputError
from rlquant.quant import FORMATS, get_format, unsigned

FLOATS = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
SMALL_FLOATS = [name for name in FLOATS if name != "fp32"]
SATURATING = ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"]
INTS = [f"int{bits}" for bits in range(2, 17)]

# From the appendix of the QLoRA paper and the decision tree of bitsandbytes' dQuantizeNF4: a value above the
# threshold takes the larger code.
NF4_TABLE = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
]  # fmt: skip
NF4_THRESHOLDS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip


def bit_patterns(dtype: type) -> np.ndarray:
    """Every value of a NumPy float dtype, in the order of its bit patterns."""
    bits = np.dtype(dtype).itemsize * 8
    if dtype is ml_dtypes.float4_e2m1fn:
        return np.arange(16, dtype=np.uint8).view(dtype)
    return np.arange(2**bits).astype(f"uint{bits}").view(dtype)


def patterns_of(x: np.ndarray, dtype: type) -> np.ndarray:
    cast = x.astype(dtype)
    return cast.view(f"uint{cast.dtype.itemsize * 8}").astype(np.int64)


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_every_bit_pattern_decodes_as_in_ml_dtypes(name: str) -> None:
    expected = bit_patterns(FLOATS[name]).astype(np.float32)
    decoded = get_format(name).decode(torch.arange(len(expected))).numpy()
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


@pytest.mark.parametrize("name", SMALL_FLOATS)
def test_values_and_all_midpoints_encode_as_in_ml_dtypes(name: str) -> None:
    fmt = get_format(name)
    with np.errstate(invalid="ignore"):  # signaling NaN patterns
        values = bit_patterns(FLOATS[name]).astype(np.float64)
    values = np.unique(values[np.isfinite(values)])
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([values.astype(np.float32), middle, *near])
    codes = fmt.encode(torch.from_numpy(x)).long().numpy()
    np.testing.assert_array_equal(codes, patterns_of(x, FLOATS[name]))


@pytest.mark.parametrize("name", FLOATS)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_float_encodes_as_in_ml_dtypes(name: str, x: float) -> None:
    fmt = get_format(name)
    if name in SATURATING:
        x = max(-fmt.max, min(fmt.max, x))
    array = np.array([x], dtype=np.float32)
    with np.errstate(over="ignore"):
        expected = patterns_of(array, FLOATS[name])
    assert fmt.encode(torch.from_numpy(array)).long().tolist() == expected.tolist()


@pytest.mark.parametrize("name", FLOATS)
def test_limits_and_layout_of_floats(name: str) -> None:
    fmt, info = get_format(name), ml_dtypes.finfo(FLOATS[name])
    assert (fmt.max, fmt.min) == (float(info.max), float(info.min))
    assert fmt.smallest_step == float(info.smallest_subnormal)
    assert (fmt.bits, fmt.exponent_bits, fmt.mantissa_bits) == (info.bits, info.nexp, info.nmant)
    assert fmt.bits == 1 + fmt.exponent_bits + fmt.mantissa_bits
    assert fmt.layout == f"1 sign, {info.nexp} exponent, {info.nmant} mantissa"


@pytest.mark.parametrize("name", SATURATING)
def test_small_floats_saturate(name: str) -> None:
    fmt = get_format(name)
    x = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), fmt.max * 1.01])
    expected = torch.tensor([fmt.max, fmt.min, fmt.max, fmt.min, fmt.max])
    assert torch.equal(fmt.cast(x), expected)


def test_half_precision_overflows_to_infinity_as_torch_does() -> None:
    x = torch.tensor([1e6, -1e6])
    assert torch.equal(get_format("fp16").cast(x), x.to(torch.float16).float())


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_casts_equal_torchs(name: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name) or getattr(
        torch, {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[name]
    )
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 2, 4096)
    assert torch.equal(get_format(name).cast(x), x.to(dtype).float())


@pytest.mark.parametrize("name", INTS)
def test_integers_round_half_to_even_and_store_twos_complement(name: str) -> None:
    fmt = get_format(name)
    low, high = -(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1) - 1
    assert (fmt.min, fmt.max, fmt.smallest_step) == (low, high, 1)
    x = np.arange(low - 2, high + 3, 0.5, dtype=np.float32)
    expected = np.clip(np.rint(x), low, high).astype(np.int64)
    codes = fmt.encode(torch.from_numpy(x)).long().numpy()
    np.testing.assert_array_equal(codes, expected % 2**fmt.bits)
    np.testing.assert_array_equal(fmt.decode(torch.from_numpy(codes)).numpy(), expected)


@pytest.mark.parametrize(("name", "dtype"), [("int2", ml_dtypes.int2), ("int4", ml_dtypes.int4)])
def test_small_integers_agree_with_ml_dtypes(name: str, dtype: type) -> None:
    fmt = get_format(name)
    expected = np.arange(fmt.min, fmt.max + 1).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(fmt.values().numpy(), expected)


def test_unsigned_integers() -> None:
    fmt = unsigned(3)
    assert fmt == get_format("uint3")
    assert fmt.values().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert fmt.encode(torch.tensor([-4.0, 2.5, 3.5, 99.0])).tolist() == [0, 2, 4, 7]


def test_nf4_table_is_the_published_one() -> None:
    table = torch.tensor(NF4_TABLE)
    assert torch.equal(get_format("nf4").decode(torch.arange(16)), table)
    assert torch.equal(get_format("nf4").values(), table)


@given(
    st.one_of(st.floats(-1.5, 1.5, width=32), st.sampled_from([float(np.float32(t)) for t in NF4_THRESHOLDS]))
)
def test_nf4_takes_the_code_that_bitsandbytes_takes(x: float) -> None:
    expected = sum(np.float32(x) > np.float32(threshold) for threshold in NF4_THRESHOLDS)
    assert int(get_format("nf4").encode(torch.tensor([x]))) == expected


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "fp32"])
def test_values_are_fixed_points_ascending_and_complete(name: str) -> None:
    fmt = get_format(name)
    values = fmt.values()
    assert (values.diff() > 0).all()
    assert values[0] == fmt.min
    assert values[-1] == fmt.max
    assert values[values > 0].min() == torch.tensor(fmt.smallest_step)
    assert torch.equal(fmt.cast(values), values)
    assert torch.equal(fmt.decode(fmt.encode(values)), values)


@pytest.mark.parametrize("name", [*FORMATS, "uint8"])
@given(x=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=8))
def test_cast_is_decode_of_encode_and_nearest(name: str, x: list[float]) -> None:
    fmt = get_format(name)
    values = torch.tensor(x)
    cast = fmt.cast(values)
    assert torch.equal(cast, fmt.decode(fmt.encode(values)))
    if fmt.bits <= 8:
        nearest = (fmt.values()[None].double() - values[:, None].double()).abs().amin(dim=1)
        assert torch.equal((cast.double() - values.double()).abs(), nearest)


@pytest.mark.parametrize("name", ["int8", "fp4_e2m1", "nf4"])
def test_nan_is_refused_where_there_is_no_code_for_it(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} has no code"):
        get_format(name).encode(torch.tensor([0.0, float("nan")]))


def test_nan_survives_where_the_format_has_it() -> None:
    for name in ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2"):
        assert get_format(name).cast(torch.tensor([float("nan")])).isnan().all()


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown number format 'fp8_e4m4'. Did you mean 'fp8_e4m3'"):
        get_format("fp8_e4m4")
    with pytest.raises(InputError, match="uint17"):
        get_format("uint17")
    with pytest.raises(InputError, match="16 bits only"):
        get_format("fp32").values()
