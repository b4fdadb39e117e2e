"""GPTQ's inner loop as a kernel against the same loop in PyTorch, which other tests hold against the paper.

Without a GPU, Triton's interpreter runs the kernel.
"""

import pytest
import torch
from calibration_data import correlated

from rlquant.quant import QParams, Scheme
from rlquant.quant.compensate import Factor, round_with_compensation
from rlquant.quant.tensor import nearest_qparams, spread_qparams

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [("int4", 3, 1), ("int4-g8", 33, 40), ("int3-g5-asym", 7, 23), ("int8-asym", 40, 16), ("int2-tensor", 2, 7),
     ("int4-tensor-asym", 9, 17)],
)  # fmt: skip
def test_a_block_is_rounded_as_in_pytorch(name: str, rows: int, columns: int) -> None:
    from rlquant.quant.compensate_cuda import round_block

    scheme = Scheme.parse(name)
    x = correlated(300, columns, 1).double()
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    factor = Factor(x.T @ x / len(x), 0.01, "", act_order=False)
    chosen = nearest_qparams(weight, scheme)
    assert chosen is not None
    spread = spread_qparams(chosen, scheme, columns)
    expected, losses = round_with_compensation(weight, spread, scheme.stored, factor)
    turned = QParams(
        spread.scale.T.contiguous().to(DEVICE),
        None if spread.zero_point is None else spread.zero_point.T.contiguous().to(DEVICE),
    )
    given_weight = weight.T.contiguous().to(DEVICE)
    errors = round_block(given_weight, 0, turned, factor.upper.to(DEVICE), scheme.stored)
    # A value between two codes may go either way by the last bit, after which the two loops part: few rows may.
    alike = torch.isclose(given_weight.T.cpu(), expected, rtol=1e-5, atol=1e-6).all(dim=1)
    assert alike.float().mean() >= 0.9
    torch.testing.assert_close(errors.square().sum(dim=0).cpu()[alike], losses[alike], rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4-g128", "int3-g32-asym"])
def test_many_blocks_on_a_gpu(name: str) -> None:
    scheme = Scheme.parse(name)
    x = correlated(2000, 700, 0).double()
    weight = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    chosen = nearest_qparams(weight, scheme)
    assert chosen is not None
    losses = {}
    for device in ("cpu", "cuda"):
        factor = Factor((x.T @ x / len(x)).to(device), 0.01, "")
        point = chosen.zero_point
        moved = QParams(chosen.scale.to(device), None if point is None else point.to(device))
        spread = spread_qparams(moved, scheme, 700)
        _, losses[device] = round_with_compensation(weight.to(device), spread, scheme.stored, factor)
    torch.testing.assert_close(losses["cuda"].cpu(), losses["cpu"], rtol=0.05, atol=0)
    torch.testing.assert_close(losses["cuda"].cpu().sum(), losses["cpu"].sum(), rtol=2e-3, atol=0)
