"""Scheme names: what they mean, that they round-trip, and what is said of a wrong one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlquant.errors import InputError
from rlquant.quant import (
    FORMATS,
    OBSERVERS,
    SCHEME_EXAMPLES,
    Granularity,
    Scheme,
    get_format,
    scheme_choices,
    unsigned,
)

CHANNEL = Granularity("channel")


@pytest.mark.parametrize("name", scheme_choices())
def test_listed_names_are_canonical(name: str) -> None:
    scheme = Scheme.parse(name)
    assert scheme.name == str(scheme) == name
    assert Scheme.parse(name) == scheme


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("fp32", Scheme(get_format("fp32"))),
        ("int8", Scheme(get_format("int8"))),
        ("nf4", Scheme(get_format("nf4"), granularity=Granularity("group", 64))),
        ("fp4_e2m1-channel", Scheme(get_format("fp4_e2m1"))),
        ("fp8_e4m3-tensor", Scheme(get_format("fp8_e4m3"), granularity=Granularity("tensor"))),
        ("w8a8", Scheme(get_format("int8"), unsigned(8))),
        ("w2a16-dynamic", Scheme(get_format("int2"), unsigned(16), dynamic=True)),
        ("w4a8-g32-asym", Scheme(get_format("int4"), unsigned(8), Granularity("group", 32), symmetric=False)),
        ("int4-mse", Scheme(get_format("int4"), observer="mse")),
        ("w4a4-act_entropy", Scheme(get_format("int4"), unsigned(4), activation_observer="entropy")),
    ],
)
def test_names_mean_what_they_say(name: str, scheme: Scheme) -> None:
    assert Scheme.parse(name) == scheme
    assert scheme.name == name


@pytest.mark.parametrize(
    ("loose", "canonical"),
    [
        (" W4A8-ASYM-g32 ", "w4a8-g32-asym"),
        ("int8-channel-minmax", "int8"),
        ("nf4-g64", "nf4"),
        ("int4-mse-g128", "int4-g128-mse"),
    ],
)
def test_order_case_and_defaults_do_not_matter(loose: str, canonical: str) -> None:
    assert Scheme.parse(loose).name == canonical


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    weights = draw(st.sampled_from([fmt for fmt in FORMATS.values() if fmt.is_scaled]))
    is_int = weights.kind == "int"
    bits = draw(st.none() | st.integers(2, 16)) if is_int else None
    dynamic = bits is not None and draw(st.booleans())
    return Scheme(
        weights,
        None if bits is None else unsigned(bits),
        draw(
            st.sampled_from(
                [Granularity("tensor"), CHANNEL, Granularity("group", 64), Granularity("group", 7)]
            )
        ),
        symmetric=not is_int or draw(st.booleans()),
        observer=draw(st.sampled_from(sorted(OBSERVERS))),
        activation_observer="minmax" if bits is None or dynamic else draw(st.sampled_from(sorted(OBSERVERS))),
        dynamic=dynamic,
    )


@given(schemes())
def test_every_scheme_round_trips_through_its_name(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.name) == scheme


def test_what_a_scheme_needs() -> None:
    assert Scheme.parse("fp32").is_identity
    assert not Scheme.parse("bf16").is_identity
    needs = [name for name in SCHEME_EXAMPLES if Scheme.parse(name).needs_calibration]
    assert needs == ["w8a8", "w4a8", "w4a8-g32-asym", "w2a3"]
    assert Scheme.parse("int4-asym").stored == unsigned(4)
    assert Scheme.parse("int4").stored == get_format("int4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("in8", r"unknown scheme 'in8'. Did you mean 'int8'\? Choices: fp32, fp16"),
        ("w8a", r"Did you mean 'w8a8'"),
        ("w4a17", r"'w4a17' asks for 17 bits: wXaY takes 2 to 16 bits"),
        ("w1a8", r"'w1a8' asks for 1 bits"),
        ("int17", r"unknown scheme 'int17'"),
        ("", r"unknown scheme ''"),
        ("int8-g", r"unknown suffix of scheme 'int8-g': '-g'"),
        ("int8-asim", r"Did you mean '-asym'"),
        ("int8-g0", r"group size 0 is not usable"),
        ("int8-g32-tensor", r"says '-g32' and '-tensor': keep one"),
        ("int8-dynamic", r"name their bits, as in 'w8a8-dynamic'"),
        ("int8-act_mse", r"name their bits"),
        ("w8a8-dynamic-act_mse", r"has no activation observer"),
        ("nf4-asym", r"nf4 has no asymmetric form"),
        ("bf16-g32", r"bf16 is a plain cast"),
        ("fp32-mse", r"fp32 is a plain cast"),
    ],
)
def test_wrong_names_say_the_way_out(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scheme.parse(name)


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(InputError, match="beside integer weights"):
        Scheme(get_format("nf4"), unsigned(8))
    with pytest.raises(InputError, match="unsigned integers"):
        Scheme(get_format("int8"), get_format("int8"))
    with pytest.raises(InputError, match="unknown observer 'kl'"):
        Scheme(get_format("int8"), observer="kl")
    with pytest.raises(InputError, match="unknown weight format 'uint8'"):
        Scheme(unsigned(8))
