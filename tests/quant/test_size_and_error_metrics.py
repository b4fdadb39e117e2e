"""Exact sizes against the bytes that are stored, and error metrics against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from rlquant.errors import InputError
from rlquant.quant import max_error, mse, quantize_, size_table, sqnr_db, weight_bytes

SCHEMES = ["fp32", "bf16", "nf4", "int3-g7-asym", "int8", "w4a8", "w8a8-dynamic", "fp8_e5m2-tensor"]


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.memory = nn.LSTM(5, 6, num_layers=2)
        self.head = nn.Linear(6, 3)
        self.log_std = nn.Parameter(torch.zeros(3))
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(x)).mean(dim=(2, 3))
        return self.head(self.memory(features[None])[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_bytes_are_the_bytes_stored(scheme: str) -> None:
    module = quantize_(Mixed(), scheme, calibration=torch.rand(2, 3, 8, 8))
    state = module.state_dict()
    header = int.from_bytes(save(state)[:8], "little")
    assert weight_bytes(module) == len(save(state)) - 8 - header
    assert weight_bytes(module) == sum(row.total for row in size_table(module))


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 30), bits=st.integers(2, 16),
    n=st.integers(1, 12), asymmetric=st.booleans(),
)  # fmt: skip
def test_bits_are_counted_exactly(rows: int, columns: int, bits: int, n: int, asymmetric: bool) -> None:
    layer = quantize_(nn.Linear(columns, rows), f"int{bits}-g{n}" + ("-asym" if asymmetric else ""))
    (row,) = size_table(layer)
    groups = rows * math.ceil(columns / n)
    assert row.codes == math.ceil(rows * columns * bits / 8)
    assert row.scales == 4 * groups
    assert row.zero_points == (math.ceil(groups * bits / 8) if asymmetric else 0)
    assert row.other == 4 * rows
    assert row.bits_per_weight == pytest.approx(
        8 * (row.codes + row.scales + row.zero_points) / (rows * columns)
    )


def test_table_of_a_mixed_module() -> None:
    module = quantize_(Mixed(), "w8a8", skip=["head"], calibration=torch.rand(2, 3, 8, 8))
    table = {row.name: row for row in size_table(module)}
    assert list(table) == ["", "conv", "norm", "memory", "head"]
    assert {name: row.precision for name, row in table.items()} == {
        "": "float32", "conv": "w8a8", "norm": "float32", "memory": "w8a8", "head": "float32",
    }  # fmt: skip
    assert table[""].total == 12
    assert table["norm"].total == 4 * 5 * 4 + 8
    assert table["memory"].weights == 24 * (5 + 6 + 6 + 6)
    assert table["memory"].codes == table["memory"].weights
    assert table["memory"].other == 4 * 24 * 4 + 4 * 8  # biases; scale and zero point of four activations
    assert (table["head"].codes, table["head"].other, table["head"].bits_per_weight) == (72, 12, 32.0)


def test_shared_tensors_count_once() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4, bias=False)
    tied.weight = shared.weight
    module = nn.Sequential(shared, nn.ReLU(), shared, tied)
    assert weight_bytes(module) == 4 * (16 + 4)
    quantize_(module, "int8", skip=["3"])
    assert weight_bytes(module) == (16 + 16 + 16) + 64


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20), st.integers(0, 1000))
def test_metrics_follow_their_definitions(values: list[float], seed: int) -> None:
    x = torch.tensor(values)
    noise = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) - 0.5
    q = x + noise
    difference = q.double().numpy() - x.double().numpy()
    assert mse(x, q) == pytest.approx(np.mean(difference**2))
    assert max_error(x, q) == pytest.approx(np.abs(difference).max())
    signal = np.sum(x.double().numpy() ** 2)
    if signal > 0 and np.any(difference):
        assert sqnr_db(x, q) == pytest.approx(10 * np.log10(signal / np.sum(difference**2)))


def test_metrics_at_the_edges() -> None:
    x = torch.ones(3)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(torch.zeros(3), x) == -math.inf
    with pytest.raises(InputError, match=r"cannot compare shapes \(3,\) and \(2,\)"):
        mse(x, torch.ones(2))
    with pytest.raises(InputError, match="at least one element"):
        max_error(torch.empty(0), torch.empty(0))
