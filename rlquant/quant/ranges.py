"""Range rules: from the values that share a scale to the range ``[low, high]`` that the grid covers.

A rule takes ``blocks``, float32 ``[blocks, n]`` (one row per scale), and the format; it returns ``low`` and
``high``, float32 ``[blocks]``. For a signed format the range is symmetric, ``-t .. t``; for an unsigned one
it includes zero. A narrower range rounds most values more finely and clips the rest: rules differ in that
trade.

========== =========================================================================================
minmax     every value is covered; no clipping
mean_abs   ``2 * mean|x| * sqrt(qmax)``, the initial step of LSQ (Esser et al. 2020, arXiv:1902.08153)
percentile the central 99.9% of the values
mse        the range with the least squared error, searched over 80 fractions of the min-max range
entropy    the range whose quantized histogram has the least KL divergence from the original's
           (Migacz 2017, "8-bit inference with TensorRT")
========== =========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlquant.errors import unknown_name
from rlquant.quant.affine import fake_quantize, qparams_from_range
from rlquant.quant.formats import Format

__all__ = ["OBSERVERS", "Range", "RangeRule", "get_observer", "squared_error"]

Range = tuple[Tensor, Tensor]
RangeRule = Callable[[Tensor, Format], Range]

PERCENTILE = 99.9
CLIP_STEPS = 80
SMALLEST_CLIP = 0.2
HISTOGRAM_BINS = 2048
VALUES_PER_BIN = 8  # a finer histogram measures the noise of the sample, not its distribution
ENTROPY_STEPS = 64


def minmax(blocks: Tensor, fmt: Format) -> Range:
    """The smallest range that clips nothing."""
    low, high = torch.aminmax(blocks, dim=1)
    if fmt.signed:
        high = torch.maximum(high, -low)
        return -high, high
    return low.clamp(max=0.0), high.clamp(min=0.0)


def mean_abs(blocks: Tensor, fmt: Format) -> Range:
    """``2 * mean|x| * sqrt(qmax)`` on each side, within the min-max range; qmax = 2^(bits-1) - 1."""
    clip = 2.0 * blocks.abs().mean(dim=1) * (2 ** (fmt.bits - 1) - 1) ** 0.5
    return _clipped(minmax(blocks, fmt), clip)


def percentile(blocks: Tensor, fmt: Format, keep: float = PERCENTILE) -> Range:
    """The range that holds ``keep`` percent of the values, interpolated between order statistics."""
    if fmt.signed:
        high = _quantile(blocks.abs(), keep / 100.0)
        return -high, high
    tail = (1.0 - keep / 100.0) / 2.0
    low, high = _quantile(blocks, tail), _quantile(blocks, 1.0 - tail)
    return low.clamp(max=0.0), high.clamp(min=0.0)


def mse(blocks: Tensor, fmt: Format, offered: Range | None = None) -> Range:
    """The range of least squared error among fractions 0.2 .. 1 of min-max, and ``offered`` if given.

    ``offered`` lets a group also consider the range of its whole channel; with it, a group is never worse.
    """
    full_low, full_high = minmax(blocks, fmt)
    fractions = torch.linspace(1.0, SMALLEST_CLIP, CLIP_STEPS).tolist()
    candidates = [(full_low * fraction, full_high * fraction) for fraction in fractions]
    if offered is not None:
        candidates.append(offered)
    best_low, best_high = candidates[0]
    best_error = squared_error(blocks, (best_low, best_high), fmt)
    for low, high in candidates[1:]:
        error = squared_error(blocks, (low, high), fmt)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high


def entropy(blocks: Tensor, fmt: Format) -> Range:
    """The clip of least KL divergence over a histogram of ``|x|``, within the min-max range.

    Blocks with too few values for a histogram finer than the grid get their min-max range.
    """
    magnitude = blocks.abs()
    largest = magnitude.amax(dim=1)
    # One-sided data, such as the output of a ReLU, has every level of an unsigned grid to itself.
    one_sided = not fmt.signed and bool((blocks >= 0).all())
    levels = 2**fmt.bits if one_sided else 2 ** (fmt.bits - 1)
    bins = min(HISTOGRAM_BINS, blocks.shape[1] // VALUES_PER_BIN)
    if levels >= bins:
        return minmax(blocks, fmt)
    histogram = _histogram(magnitude, largest, bins)
    kept = sorted(set(torch.linspace(levels, bins, ENTROPY_STEPS).round().int().tolist()))
    divergence = torch.stack([_divergence(histogram, count, levels) for count in kept])
    best = torch.tensor(kept, device=blocks.device)[divergence.argmin(dim=0)]
    return _clipped(minmax(blocks, fmt), largest * best / bins)


OBSERVERS: dict[str, RangeRule] = {
    "minmax": minmax,
    "mean_abs": mean_abs,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def get_observer(name: str) -> RangeRule:
    """The range rule called ``name``. Raises InputError that lists the rules."""
    if name not in OBSERVERS:
        raise unknown_name("observer", name, OBSERVERS)
    return OBSERVERS[name]


def squared_error(blocks: Tensor, chosen: Range, fmt: Format) -> Tensor:
    """Sum of squared quantization errors of each block under a range: float32 ``[blocks]``."""
    low, high = chosen
    qparams = qparams_from_range(low[:, None], high[:, None], fmt)
    return (fake_quantize(blocks, qparams, fmt) - blocks).square_().sum(dim=1)


def _clipped(full: Range, clip: Tensor) -> Range:
    return torch.maximum(full[0], -clip), torch.minimum(full[1], clip)


def _quantile(blocks: Tensor, fraction: float) -> Tensor:
    """Linear interpolation between order statistics of each row; ``torch.quantile`` stops at 16M elements."""
    position = fraction * (blocks.shape[1] - 1)
    below = int(position)
    lower = blocks.kthvalue(below + 1, dim=1).values
    if below + 1 >= blocks.shape[1]:
        return lower
    upper = blocks.kthvalue(below + 2, dim=1).values
    return torch.lerp(lower, upper, position - below)


def _histogram(magnitude: Tensor, largest: Tensor, bins: int) -> Tensor:
    """Counts of ``|x|`` in equal bins from 0 to each row's largest: float32 ``[blocks, bins]``."""
    # Divided by the largest first: a bin's width could underflow to zero.
    share = magnitude / torch.where(largest == 0, 1.0, largest)[:, None]
    index = (share * bins).long().clamp_(max=bins - 1)
    counts = torch.zeros(len(magnitude), bins, device=magnitude.device)
    counts.scatter_add_(1, index, torch.ones_like(magnitude))
    # Zeros, half of the output of a ReLU, are exact on every grid and must not drown the rest.
    counts[:, 0] = counts[:, 1]
    return counts


def _divergence(histogram: Tensor, bins: int, levels: int) -> Tensor:
    """KL(P || Q) of each row where the first ``bins`` bins are kept: float32 ``[blocks]``.

    P is the kept histogram with the clipped tail added to its last bin; Q is the kept histogram merged into
    ``levels`` equal levels and spread evenly over the non-empty bins of each.
    """
    kept = histogram[:, :bins]
    p = kept.clone()
    p[:, -1] += histogram[:, bins:].sum(dim=1)
    level = torch.arange(bins, device=histogram.device) * levels // bins
    empty = torch.zeros(len(histogram), levels, device=histogram.device)
    total = empty.index_add(1, level, kept)
    filled = empty.index_add(1, level, (kept > 0).to(kept.dtype))
    q = torch.where(kept > 0, (total / filled.clamp(min=1.0))[:, level], 0.0)
    q_sum = q.sum(dim=1, keepdim=True).clamp(min=1.0)
    p_sum = p.sum(dim=1, keepdim=True)
    # A bin that P fills and Q does not makes the divergence infinite, as the definition says.
    terms = torch.where(p > 0, p / p_sum * torch.log((p / p_sum) / (q / q_sum)), 0.0)
    return terms.sum(dim=1)
