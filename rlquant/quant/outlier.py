"""Outlier split: the few input channels that carry most stay in 16 bit, with weights and inputs unrounded.

``W x = W_rest x_rest + W_out x_out`` is exact before rounding. The codes of the outlier columns are zero, so
that neither the scales of the weights nor the range of the activation has to cover them. LLM.int8 takes
channels whose inputs exceed 6; a policy has no such constant, so here the channels with the largest
contribution ``sqrt(E x_j^2) * |W_:,j|`` are taken, a share of 1/64 and at least one. Their float16 weights
and indices count in the layer's bytes.

Source: Dettmers et al. 2022, arXiv:2208.07339, section 3.2.
"""

from __future__ import annotations

import math
import warnings

import torch

from rlquant.errors import InputError
from rlquant.quant.bench import Bench
from rlquant.quant.notes import CalibrationWarning

__all__ = ["SHARE", "split_outliers"]

SHARE = 1 / 64


def split_outliers(bench: Bench) -> None:
    """Choose the outlier channels of every Linear and Conv2d on the bench."""
    twins = [twin for twin in bench.twins.values() if twin.rescalable]
    left = [name for name, twin in bench.twins.items() if not twin.rescalable]
    if left:
        warnings.warn(
            f"outliers are kept in Linear layers and in Conv2d without groups; not in {', '.join(left)}",
            CalibrationWarning,
            stacklevel=2,
        )
    moments = bench.moments(twin.name for twin in twins)
    for twin in twins:
        seen = moments[twin.name].by_matrix["packed"]
        if seen.count == 0:
            continue
        weight = bench.weight_channels(twin, twin.channels).double()
        size = seen.square_mean[0].view(twin.channels, -1).mean(dim=1).sqrt()
        contribution = size * weight.square().sum(dim=(0, 2)).sqrt()
        count = math.ceil(SHARE * twin.channels)
        twin.outliers = contribution.topk(count).indices.sort().values
        largest = float(weight[:, twin.outliers].abs().max())
        if largest > torch.finfo(torch.float16).max:
            raise InputError(f"layer {twin.name!r}: an outlier weight of {largest:g} does not fit in float16")
