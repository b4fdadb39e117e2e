"""Fused layers against bitsandbytes, float64 autograd and transformers' blocks; without a GPU, in the interpreter."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from rlquant.llm import adapter_layer
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.backbone import BaseSettings, load_backbone
from rlquant.llm.fused_blocks import fuse_blocks_
from rlquant.llm.fused_nf4 import can_fuse, nf4_lora
from rlquant.llm.roles import Roles

pytest.importorskip("triton")
bnb = pytest.importorskip("bitsandbytes")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def packed(
    shape: tuple[int, int], *, nested: bool, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Any]:
    """bitsandbytes' codes of a random matrix."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return bnb.functional.quantize_4bit(
        weight.to(DEVICE, dtype), blocksize=64, quant_type="nf4", compress_statistics=nested
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (96, 192), (257, 128)])
def test_unpacked_codes_are_bitsandbytes(shape: tuple[int, int], nested: bool) -> None:
    from rlquant.llm.nf4_cuda import dequantize_nf4

    codes, state = packed(shape, nested=nested)
    expected = bnb.functional.dequantize_4bit(codes, state)
    assert torch.equal(dequantize_nf4(codes, state), expected)
    out = torch.empty_like(expected)
    assert dequantize_nf4(codes, state, out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_what_autograd_makes_of_it(dtype: torch.dtype) -> None:
    from rlquant.llm.swiglu_cuda import swiglu

    generator = torch.Generator().manual_seed(1)
    gate, up, grad = (4 * torch.randn(7, 331, generator=generator).to(DEVICE, dtype) for _ in range(3))
    exact = [each.double().requires_grad_() for each in (gate, up)]
    product = torch.nn.functional.silu(exact[0]) * exact[1]
    product.backward(grad.double())
    ours = [each.clone().requires_grad_() for each in (gate, up)]
    found = swiglu(*(each * 1 for each in ours))  # whose memory is taken
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(found.double(), product, **close)
    found.backward(grad, retain_graph=True)
    for each, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(each.grad.double(), reference.grad, **close)
    with pytest.raises(RuntimeError, match="backward once"):
        found.backward(grad)


@pytest.mark.parametrize("bias", [False, True])
def test_an_nf4_layer_with_its_adapter_is_what_autograd_makes_of_it(bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    codes, state = packed((96, 128), nested=True)
    layer = SimpleNamespace(
        weight=SimpleNamespace(quant_state=state), bias=torch.randn(96, device=DEVICE) if bias else None
    )
    layer.weight = codes
    codes.quant_state = state
    weight = bnb.functional.dequantize_4bit(codes, state).double()
    given = [torch.randn(shape, generator=generator).to(DEVICE) for shape in ((2, 5, 128), (4, 128), (96, 4))]
    x, a, b = (each.double().requires_grad_() for each in given)
    expected = x @ weight.t() + 0.5 * (x @ a.t()) @ b.t() + (0 if layer.bias is None else layer.bias.double())
    grad = torch.randn(2, 5, 96, generator=generator).to(DEVICE)
    expected.backward(grad.double())
    ours = [each.clone().requires_grad_() for each in given]
    found = nf4_lora(ours[0], layer, ours[1], ours[2], 0.5)
    found.backward(grad)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for each, reference in zip(ours, (x, a, b), strict=True):
        torch.testing.assert_close(each.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


def test_fused_blocks_compute_what_transformers_do() -> None:
    plain = copy.deepcopy(tiny.model()).to(DEVICE).train()
    fused = copy.deepcopy(plain)
    assert fuse_blocks_(fused) == 2 * 3 + 1  # two blocks with two norms and an MLP, and the last norm
    ids = torch.tensor([tiny.tokenizer()("3 and 4 make 7. 5 and")["input_ids"]], device=DEVICE)
    losses = [model(input_ids=ids, labels=ids).loss for model in (plain, fused)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    pairs = zip(plain.named_parameters(), fused.parameters(), strict=True)
    for (name, expected), found in pairs:
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_other_architectures_stay_as_they_are() -> None:
    assert fuse_blocks_(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))) == 0
    assert not can_fuse(torch.nn.Linear(4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_on_a_gpu_is_the_same_fused(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside bitsandbytes' and PEFT's arithmetic, within some roundings; and in evaluation, bit by bit."""
    folder = tiny.saved(tmp_path)
    found = []
    for fused in (False, True):
        if not fused:
            monkeypatch.setattr(adapter_layer, "can_fuse", lambda _layer: False)
            monkeypatch.setattr("rlquant.llm.backbone.fuse_blocks_", lambda _model: 0)
        lm = load_backbone(BaseSettings(source=str(folder), precision="nf4-dq")).lm
        roles = Roles(lm, checkpointing=checkpointing)
        roles.add("policy", AdapterSettings(rank=4))
        generator = torch.Generator().manual_seed(3)
        for name, each in roles.parameters("policy").items():
            if "lora_B" in name:
                each.data.copy_(torch.randn(each.shape, generator=generator) / 20)
        ids = torch.tensor([lm.tokens("3 and 4 make 7. 5 and 6 make 11. ")] * 3, device="cuda")
        mask = torch.ones_like(ids, dtype=torch.bool)
        log_probs = roles.policy(ids, mask, last=8)
        with torch.no_grad():
            assert torch.equal(roles.policy(ids, mask, last=8), log_probs)
        log_probs.square().mean().backward()
        gradients = torch.cat([each.grad.flatten() for each in roles.parameters("policy").values()])
        found.append((log_probs.detach(), gradients))
        monkeypatch.undo()
    (plain, plain_gradients), (ours, gradients) = found
    torch.testing.assert_close(ours, plain, rtol=0.03, atol=0.03)
    assert torch.nn.functional.cosine_similarity(gradients, plain_gradients, dim=0) > 0.999
