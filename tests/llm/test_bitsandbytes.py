"""Our codes in bitsandbytes' layers, against the formula of LLM.int8 written out in float64 and bitsandbytes' own
functions. Its CPU kernels run here; CUDA's where there is a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from rlquant.errors import InputError
from rlquant.llm.bitsandbytes import to_bitsandbytes_, to_llm_int8_
from rlquant.llm.model import LanguageModel
from rlquant.llm.settings import LanguageSettings
from rlquant.llm.versions import accelerate_, at_precision
from rlquant.quant import quantize_

bitsandbytes = pytest.importorskip("bitsandbytes")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
THRESHOLD = 6.0


def layers(device: str, *, bias: bool = True, scheme: str = "int8") -> tuple[nn.Module, nn.Module]:
    """A quantized layer ``[96, 64]``, in eval mode, and a copy of it that bitsandbytes computes."""
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(64, 96, bias=bias)).eval() for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    made = [quantize_(each, scheme).to(device) for each in made]
    assert to_llm_int8_(made[1]) == 1
    return made[0], made[1]


def inputs(device: str, *, outliers: bool = False) -> Tensor:
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1)).clamp(-4, 4).half()
    if outliers:
        x[3, 7], x[20, 7], x[11, 40] = 60.0, -9.0, 45.0
    return x.to(device)


def by_the_paper(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """LLM.int8 of codes ``weight`` ``[out, in]`` and ``scale`` ``[out, 1]``, in float64."""
    x, weight, scale = x.double().cpu(), weight.double().cpu(), scale.double().cpu()
    outlying = (x.abs() >= THRESHOLD).any(dim=0)
    inner = torch.where(outlying, 0.0, x)
    largest = torch.where(x.abs() >= THRESHOLD, 0.0, x).abs().amax(dim=1, keepdim=True)
    rounded = (inner * 127 / largest).round() * largest / 127
    y = rounded @ (weight * scale).T + x[:, outlying] @ (weight * scale)[:, outlying].T
    return y if bias is None else y + bias.double().cpu()


def codes_of(layer: Any) -> Tensor:
    """Two's complement, unpacked by NumPy."""
    return torch.from_numpy(layer.packed.codes.cpu().numpy().view("int8").reshape(layer.packed.shape).copy())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_codes_are_multiplied_as_the_paper_says(device: str, outliers: bool, bias: bool) -> None:
    ours, theirs = layers(device, bias=bias)
    x = inputs(device, outliers=outliers)
    with torch.no_grad():
        y = theirs(x).double().cpu()
    expected = by_the_paper(x, codes_of(ours[0]), ours[0].packed.scale, ours[0].bias)
    near = 0.001 * float(expected.abs().max()) + 2e-4  # results, and products with outliers, round to float16
    assert float((y - expected).abs().max()) < near
    weight_only = ours(x.float()).double().cpu()
    step = x.double().cpu().abs().masked_fill(x.cpu().abs() >= THRESHOLD, 0).amax(dim=1) / 127
    bound = 0.5 * step[:, None] * ours[0].weight.double().cpu().abs().sum(dim=1) + near
    assert bool(((y - weight_only).abs() <= bound).all())
    if not outliers:  # activations really are rounded
        assert float((expected - weight_only).abs().max()) > 2 * near
    else:  # which one grid for all columns would not survive
        flat = x.double().cpu()
        largest = flat.abs().amax(dim=1, keepdim=True)
        one_grid = (flat * 127 / largest).round() * largest / 127 @ ours[0].weight.double().cpu().T
        one_grid = one_grid if ours[0].bias is None else one_grid + ours[0].bias.double().cpu()
        assert float((one_grid - weight_only).abs().max()) > 5 * float((y - weight_only).abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["int8", "int8-mse"])
def test_nothing_is_quantized_again(device: str, scheme: str) -> None:
    ours, theirs = layers(device, scheme=scheme)
    layer: Any = theirs[0]
    back = bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
    assert torch.equal(layer.weight.CB.cpu(), codes_of(ours[0]))
    torch.testing.assert_close(back, ours[0].weight, rtol=1e-6, atol=0)
    with torch.no_grad():
        theirs(inputs(device))
    assert torch.equal(layer.state.CB.cpu(), codes_of(ours[0]))
    assert not layer.training  # in training mode its CPU path multiplies with float activations


def fresh() -> LanguageModel:
    return LanguageModel(tiny.model(), tiny.tokenizer(), "tiny", "fp32")


@pytest.mark.parametrize("device", DEVICES)
def test_only_who_asks_for_it_gets_it(device: str) -> None:
    lm = fresh().but(model=fresh().model.to(device))
    plain, asked = (at_precision(lm, name) for name in ("int8", "llm-int8"))
    ids = torch.arange(40, device=device)[None]
    assert plain.precision == asked.precision == "int8"
    with torch.no_grad():
        before = asked.model(ids).logits
        assert torch.equal(plain.model(ids).logits, before)
        assert accelerate_(plain, "fp32", "int8") == "torch"
        assert accelerate_(asked, "fp32", "llm-int8") == "bitsandbytes LLM.int8"
        assert torch.equal(plain.model(ids).logits, before)
        after = asked.model(ids).logits
    kinds = {
        type(part).__name__ for part in asked.model.model.layers.modules() if isinstance(part, nn.Linear)
    }
    assert kinds == {"Linear8bitLt"}
    assert 0 < float((after - before).abs().max()) < 0.05 * float(before.abs().max())


def test_evaluate_llm_int8(rlquant: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    text = ("--text", tmp_path / "text.txt", "--window", 64, "--windows", 6)
    plans = ("--precisions", "fp32,int8,llm-int8", "--methods", "rtn,awq")
    done = rlquant("evaluate", tiny.saved(tmp_path / "model"), *text, *plans, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    found = [(row["precision"], row["method"], row["runtime"]) for row in rows]
    assert found == [
        ("fp32", "none", "torch"),
        ("int8", "rtn", "torch"),
        ("int8", "awq", "torch"),
        ("llm-int8", "rtn", "bitsandbytes LLM.int8"),
    ]
    assert rows[3]["bytes"] == rows[1]["bytes"]
    assert rows[3]["score"]["mean"] != rows[1]["score"]["mean"]
    assert rows[3]["score"]["mean"] == pytest.approx(rows[1]["score"]["mean"], rel=0.02)
    assert [row["latency_us"]["simulated"] for row in rows] == [False, True, True, False]
    assert "LLM.int8" in (tmp_path / "run" / "report.html").read_text()
    refused = rlquant("quantize", tmp_path / "model", "--scheme", "llm-int8", "--out", tmp_path / "no")
    assert refused.status == 2
    assert "llm" in refused.err


def test_what_cannot_be_llm_int8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("int8-g32", "int8-asym", "w8a8-dynamic", "int4"):
        with pytest.raises(InputError, match=f"cannot multiply with 0, quantized to {scheme}: take int8"):
            to_llm_int8_(quantize_(nn.Sequential(nn.Linear(64, 8)), scheme))
    with pytest.raises(InputError, match="awq cannot do llm-int8; rtn can"):
        LanguageSettings(precisions=("llm-int8",), methods=("awq",))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r'pip install "rlquant\[gpu\]"'):
        LanguageSettings(precisions=("llm-int8",))


def test_its_fp4_is_another_format() -> None:
    """The reason why ``fp4_e2m1`` is not handed over."""
    theirs = bitsandbytes.functional.get_4bit_type("fp4", device="cpu").abs().unique() * 12
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]) * 2
    assert int((theirs != e2m1).sum()) == 1
    assert float(theirs[1]) == pytest.approx(12 / 192)
    layer = nn.Sequential(nn.Linear(64, 8))
    assert to_bitsandbytes_(quantize_(layer, "fp4_e2m1")) == 0
