"""Observers against NumPy and SciPy, and what streaming may and may not change."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from rlquant.errors import InputError
from rlquant.quant import OBSERVERS, Format, Observer, get_format, get_observer, unsigned

rows = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 60)), elements=st.floats(-1000, 1000, width=32)
)


def heavy_tailed(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, generator=generator) ** 3


@given(x=rows, observer=st.sampled_from(sorted(OBSERVERS)), signed=st.booleans(), bits=st.integers(2, 8))
@example(x=np.full((1, 64), 1e-45, np.float32), observer="entropy", signed=False, bits=2)
def test_every_rule_stays_inside_minmax_and_covers_zero(
    x: np.ndarray, observer: str, signed: bool, bits: int
) -> None:
    fmt = get_format(f"int{bits}") if signed else unsigned(bits)
    low, high = (side.numpy() for side in get_observer(observer)(torch.from_numpy(x), fmt))
    largest = np.abs(x).max(axis=1)
    assert (low <= 0).all()
    assert (high >= 0).all()
    if signed:
        np.testing.assert_array_equal(low, -high)
        assert (high <= largest).all()
    else:
        assert (low >= np.minimum(x.min(axis=1), 0)).all()
        assert (high <= np.maximum(x.max(axis=1), 0)).all()


@given(rows)
def test_minmax_is_the_extremes(x: np.ndarray) -> None:
    low, high = OBSERVERS["minmax"](torch.from_numpy(x), unsigned(8))
    np.testing.assert_array_equal(low.numpy(), np.minimum(x.min(axis=1), 0))
    np.testing.assert_array_equal(high.numpy(), np.maximum(x.max(axis=1), 0))


@given(rows)
def test_percentile_is_numpys(x: np.ndarray) -> None:
    _, high = OBSERVERS["percentile"](torch.from_numpy(x), get_format("int8"))
    np.testing.assert_allclose(high.numpy(), np.percentile(np.abs(x), 99.9, axis=1), rtol=1e-4, atol=1e-4)
    low, high = OBSERVERS["percentile"](torch.from_numpy(x), unsigned(8))
    np.testing.assert_allclose(
        low.numpy(), np.minimum(np.percentile(x, 0.05, axis=1), 0), rtol=1e-4, atol=1e-3
    )
    np.testing.assert_allclose(
        high.numpy(), np.maximum(np.percentile(x, 99.95, axis=1), 0), rtol=1e-4, atol=1e-3
    )


def test_mean_abs_is_the_lsq_initial_step() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0, 30.0, 2.0]])
    _, high = OBSERVERS["mean_abs"](x, get_format("int3"))
    assert float(high) == pytest.approx(2 * 6.0 * 3**0.5)  # mean|x| = 6, qmax = 3
    _, high = OBSERVERS["mean_abs"](x, get_format("int8"))
    assert float(high) == 30.0


def quantization_error(x: np.ndarray, clip: float, fmt: Format) -> float:
    """Squared error of symmetric quantization, in float64 NumPy."""
    values = fmt.values().double().numpy()
    values = values[np.abs(values) <= fmt.max]
    step = clip / fmt.max
    nearest = values[np.abs(x[:, None] / step - values).argmin(axis=1)]
    return float(((nearest * step - x) ** 2).sum())


@pytest.mark.parametrize("name", ["int2", "int4", "nf4", "fp4_e2m1"])
def test_mse_finds_the_best_clip(name: str) -> None:
    fmt, x = get_format(name), heavy_tailed(600)
    _, high = OBSERVERS["mse"](x, fmt)
    values = x[0].double().numpy()
    dense = [
        quantization_error(values, clip, fmt) for clip in np.linspace(0.2, 1.0, 400) * np.abs(values).max()
    ]
    assert quantization_error(values, float(high), fmt) <= 1.03 * min(dense)
    assert quantization_error(values, float(high), fmt) < 0.95 * dense[-1]


def reference_entropy_clip(x: np.ndarray, levels: int, bins: int, candidates: list[int]) -> float:
    """The calibration loop of Migacz 2017, one candidate at a time, with SciPy's divergence."""
    counts, edges = np.histogram(np.abs(x), bins=bins, range=(0, np.abs(x).max()))
    counts[0] = counts[1]
    best, clip = np.inf, edges[-1]
    for kept in candidates:
        p = counts[:kept].astype(np.float64)
        p[-1] += counts[kept:].sum()
        q = np.zeros(kept)
        level = np.arange(kept) * levels // kept
        for j in range(levels):
            members = np.flatnonzero((level == j) & (counts[:kept] > 0))
            q[members] = counts[:kept][level == j].sum() / max(1, len(members))
        divergence = stats.entropy(p, q)
        if divergence < best:
            best, clip = divergence, edges[kept]
    return float(clip)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_entropy_follows_the_reference_loop(bits: int) -> None:
    x = heavy_tailed(4000, seed=bits)
    levels, bins = 2 ** (bits - 1), 500
    candidates = sorted(set(np.round(np.linspace(levels, bins, 64)).astype(int).tolist()))
    _, high = OBSERVERS["entropy"](x, get_format(f"int{bits}"))
    expected = reference_entropy_clip(x[0].numpy(), levels, bins, candidates)
    assert expected < float(x.abs().max())
    # A value on the edge of a bin may fall on either side in float32.
    assert float(high) == pytest.approx(expected, rel=2 * 500 / 64 / 100)


def test_entropy_gives_one_sided_data_all_levels() -> None:
    x = heavy_tailed(4000).abs()
    low, high = OBSERVERS["entropy"](x, unsigned(5))
    _, symmetric = OBSERVERS["entropy"](x, get_format("int6"))
    assert float(low) == 0.0
    assert float(high) == float(symmetric)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_streaming_a_short_stream_equals_the_whole(observer: str) -> None:
    x = heavy_tailed(3000)[0]
    fmt = unsigned(4)
    streamed = Observer(fmt, observer)
    for batch in x.split(700):
        streamed.observe(batch.view(-1, 10))
    whole = Observer(fmt, observer)
    whole.observe(x)
    assert torch.allclose(streamed.qparams().scale, whole.qparams().scale, rtol=1e-5)
    low, high = OBSERVERS[observer](x[None], fmt)
    scale = (high - low) / 15
    assert float(whole.qparams().scale) == pytest.approx(float(scale), rel=0.02)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_long_stream_is_bounded_seeded_and_close(observer: str) -> None:
    def run(seed: int) -> Observer:
        stream = Observer(unsigned(8), observer, sample_size=2000, seed=seed)
        for seed_of_batch in range(20):
            stream.observe(heavy_tailed(5000, seed_of_batch))
        return stream

    first, again, other = run(0), run(0), run(1)
    assert first.count == 100_000
    assert first._sample.items.numel() <= 2000
    assert torch.equal(first.qparams().scale, again.qparams().scale)
    assert float(other.qparams().scale) == pytest.approx(float(first.qparams().scale), rel=0.35)


def test_the_sample_is_uniform_over_the_stream() -> None:
    stream = Observer(unsigned(8), "percentile", sample_size=4000)
    for start in range(0, 100_000, 1000):
        stream.observe(torch.arange(start, start + 1000, dtype=torch.float32))
    statistic, p_value = stats.kstest(stream._sample.items.numpy(), stats.uniform(0, 100_000).cdf)
    assert p_value > 0.01, statistic
    assert len(stream._sample.items.unique()) == 4000


def test_the_extremes_are_exact_whatever_the_sample_missed() -> None:
    stream = Observer(unsigned(8), "minmax")
    for seed in range(5):
        stream.observe(heavy_tailed(1000, seed))
    everything = torch.cat([heavy_tailed(1000, seed) for seed in range(5)])
    assert float(stream.qparams().scale) == pytest.approx(float(everything.max() - everything.min()) / 255)


def test_bad_observations_are_refused() -> None:
    stream = Observer(unsigned(8))
    with pytest.raises(InputError, match="nothing was observed"):
        stream.qparams()
    with pytest.raises(InputError, match="the reading holds NaN or Inf"):
        stream.observe(torch.tensor([float("nan")]), "the reading")
    with pytest.raises(InputError, match="Did you mean 'percentile'"):
        Observer(unsigned(8), "percentil")
