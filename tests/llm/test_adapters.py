"""Adapters on a packed base: they compute as PEFT's on the dequantized model, move, come back, and spare the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from pydantic import ValidationError
from transformers import Qwen2ForCausalLM

from rlquant.errors import InputError
from rlquant.llm.adapters import (
    AdapterSettings,
    active_adapter,
    adapter_parameters,
    add_adapter,
    base_hash,
    base_model,
    checkpoint_blocks_,
    load_adapter,
    save_adapter,
    use_adapter,
)
from rlquant.llm.bitsandbytes import to_bitsandbytes_
from rlquant.llm.learning_rate import check_learning_rate, moving_share
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.quant import QuantLinear

IDS = torch.tensor([list(range(40, 64)), list(range(70, 94))])


def base(precision: str = "nf4") -> Any:
    lm = LanguageModel(copy.deepcopy(tiny.model()), tiny.tokenizer(), "tiny", "fp32")
    return quantize_model_(lm, Plan.parse(precision)).model


def dequantized(quantized: Any) -> Qwen2ForCausalLM:
    """A float model of stock layers with the weights that the packed one stands for."""
    model = copy.deepcopy(tiny.model())
    for name, part in quantized.named_modules():
        if isinstance(part, QuantLinear):
            model.get_submodule(name).weight.data = part.weight.clone()
    return model


def stir(model: Any, name: str) -> None:
    """Give an adapter values as after training; B is zero at first."""
    generator = torch.Generator().manual_seed(len(name))
    for key, parameter in adapter_parameters(model, name).items():
        if ".lora_B." in key:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.device)


def loss_of(model: Any) -> torch.Tensor:
    return model(IDS, labels=IDS, use_cache=False).loss


@pytest.mark.parametrize(
    "settings", [{}, {"dora": True}, {"rslora": True}, {"targets": ("q_proj", "up_proj")}]
)
def test_stock_peft_computes_the_same_on_the_dequantized_model(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    packed = base()
    plain = dequantized(packed)
    model = add_adapter(packed, "policy", AdapterSettings(rank=4, **settings))
    stir(model, "policy")
    save_adapter(model, "policy", tmp_path)
    stock = peft.PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True)
    theirs, ours = loss_of(stock), loss_of(model)
    torch.testing.assert_close(ours, theirs)
    assert abs(float(ours.detach()) - float(loss_of(base()).detach())) > 1e-3
    theirs.backward()
    ours.backward()
    expected = {key.replace(".default.", ".policy."): each.grad for key, each in stock.named_parameters()}
    for key, parameter in adapter_parameters(model, "policy").items():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=1e-6)


def test_on_a_float_base_too_and_there_it_can_be_merged(tmp_path: Path) -> None:
    model = add_adapter(copy.deepcopy(tiny.model()), "policy", AdapterSettings(rank=4))
    stir(model, "policy")
    save_adapter(model, "policy", tmp_path)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(tiny.model()), str(tmp_path))
    found = model(IDS).logits.detach()
    torch.testing.assert_close(found, stock(IDS).logits)
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, found, rtol=1e-3, atol=1e-4)


def test_only_linear_layers_of_blocks_take_adapters_and_only_adapters_train() -> None:
    model = add_adapter(base(), "policy", AdapterSettings(rank=4))
    own = adapter_parameters(model, "policy")
    assert len(own) == 2 * 7 * 2  # A and B of seven layers in two blocks
    assert {key for key, each in model.named_parameters() if each.requires_grad} == set(own)
    assert {each.dtype for each in own.values()} == {torch.float32}
    assert not any("lm_head" in key or "embed" in key for key in own)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_stay_float32_on_a_bfloat16_base_whose_products_are_bfloat16(dora: bool) -> None:
    model = add_adapter(base().to(torch.bfloat16), "policy", AdapterSettings(rank=4, dora=dora))
    stir(model, "policy")
    seen = []
    layer = base_model(model).model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _module, args, out: seen.append((args[0].dtype, out.dtype)))
    loss_of(model).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    for parameter in adapter_parameters(model, "policy").values():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def changed(model: Any, rate: float, steps: int) -> float:
    """Share of elements of A that some Adam steps change."""
    own = adapter_parameters(model, "policy")
    before = {key: each.detach().clone() for key, each in own.items()}
    optimizer = torch.optim.AdamW(own.values(), rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    pairs = [(before[key], each.detach()) for key, each in own.items() if ".lora_A." in key]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def test_almost_all_of_a_moves_at_a_rate_of_1e6_which_bfloat16_loses() -> None:
    model = add_adapter(base(), "policy", AdapterSettings(rank=8))
    stir(model, "policy")
    before = base_hash(model)
    check_learning_rate(model, "policy", 1e-6)
    assert changed(model, 1e-6, 5) > 0.99
    assert base_hash(model) == before == base_hash(base())
    for parameter in adapter_parameters(model, "policy").values():
        parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does to adapters on a 4-bit base
        parameter.grad = None
    assert changed(model, 1e-6, 5) < 0.05
    assert moving_share(model, "policy", 1e-6) < 0.05
    with pytest.raises(InputError, match="vanish in bfloat16: keep adapters in float32"):
        check_learning_rate(model, "policy", 1e-6)


def test_a_rate_at_which_some_elements_stand_still_is_warned_of() -> None:
    model = add_adapter(base(), "policy", AdapterSettings(rank=8))
    with pytest.warns(UserWarning, match="vanish in float32"):
        check_learning_rate(model, "policy", 3e-9)
    with pytest.raises(InputError, match="positive"):
        check_learning_rate(model, "policy", 0.0)


def test_the_hash_of_the_base_sees_one_changed_code() -> None:
    model = add_adapter(base(), "policy", AdapterSettings())
    before = base_hash(model)
    stir(model, "policy")
    assert base_hash(model) == before
    base_model(model).model.layers[1].mlp.up_proj.base_layer.packed.codes[5] ^= 1
    assert base_hash(model) != before


def test_several_adapters_on_one_base_and_none() -> None:
    model = add_adapter(base(), "policy", AdapterSettings(rank=4))
    model = add_adapter(model, "critic", AdapterSettings(rank=2))
    stir(model, "policy")
    stir(model, "critic")
    with torch.no_grad():
        plain = base()(IDS).logits
        with active_adapter(model, None):
            assert torch.equal(model(IDS).logits, plain)
        with model.disable_adapter():
            assert torch.equal(model(IDS).logits, plain)
        policy = model(IDS).logits
        with active_adapter(model, "critic"):
            critic = model(IDS).logits
        assert torch.equal(model(IDS).logits, policy)
    assert not torch.allclose(policy, critic)
    alone = add_adapter(base(), "critic", AdapterSettings(rank=2))
    stir(alone, "critic")
    torch.testing.assert_close(alone(IDS).logits.detach(), critic)
    with pytest.raises(InputError, match=r"unknown adapter 'polcy'. Did you mean 'policy'"):
        use_adapter(model, "polcy")


def gradients(checkpointed: bool) -> tuple[list[torch.Tensor], int]:
    """Of a loss through two adapters, one backward pass after both forward passes; and how often a layer ran."""
    model = add_adapter(base(), "policy", AdapterSettings(rank=4))
    model = add_adapter(model, "critic", AdapterSettings(rank=4))
    stir(model, "policy")
    stir(model, "critic")
    if checkpointed:
        checkpoint_blocks_(model)
    model.train()
    runs: list[int] = []
    base_model(model).model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    losses = []
    for name in ("policy", "critic"):
        with active_adapter(model, name):
            losses.append(loss_of(model))
    (losses[0] + 3 * losses[1]).backward()
    own = [each for name in ("policy", "critic") for each in adapter_parameters(model, name).values()]
    return [each.grad for each in own], len(runs)


def test_checkpointed_blocks_are_recomputed_with_the_adapter_of_their_forward_pass() -> None:
    kept, runs = gradients(False)
    recomputed, runs_again = gradients(True)
    assert (runs, runs_again) == (2, 4)
    for one, other in zip(kept, recomputed, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dora", [False, True])
def test_loftq_starts_nearer_to_the_float_model(dora: bool) -> None:
    plain = tiny.model()
    quantized = base("int3-g32")
    model = add_adapter(
        quantized, "policy", AdapterSettings(rank=16, init="loftq", dora=dora), weights=plain.state_dict()
    )
    ids = torch.tensor(tiny.tokenizer()(tiny.TEXT)["input_ids"][:1024]).view(16, 64)
    with torch.no_grad():
        wanted = plain(ids).logits
        start = float((model(ids).logits - wanted).square().mean())
        with active_adapter(model, None):
            rounded = float((model(ids).logits - wanted).square().mean())
    assert start < 0.5 * rounded
    layer = base_model(model).model.layers[0].mlp.down_proj
    residual = plain.model.layers[0].mlp.down_proj.weight.detach() - layer.base_layer.weight
    rest = residual - layer.get_delta_weight("policy").detach()
    singular = torch.linalg.svdvals(residual.double())
    torch.testing.assert_close(float(rest.norm()), float(singular[16:].norm()), rtol=1e-4, atol=0)


def test_an_adapter_comes_back(tmp_path: Path) -> None:
    model = add_adapter(base(), "policy", AdapterSettings(rank=4, dora=True))
    stir(model, "policy")
    save_adapter(model, "policy", tmp_path)
    again = load_adapter(base(), "other", tmp_path, trainable=True)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    assert all(each.requires_grad for each in adapter_parameters(again, "other").values())
    frozen = load_adapter(again, "frozen", tmp_path)
    assert not any(each.requires_grad for each in adapter_parameters(frozen, "frozen").values())
    assert all(each.requires_grad for each in adapter_parameters(frozen, "other").values())


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    def values(name: str, seed: int) -> torch.Tensor:
        model = add_adapter(base(), name, AdapterSettings(rank=4, seed=seed))
        return torch.cat([each.detach().flatten() for each in adapter_parameters(model, name).values()])

    first = values("policy", 0)
    torch.manual_seed(99)
    assert torch.equal(first, values("policy", 0))
    assert not torch.equal(first, values("policy", 1))
    assert not torch.equal(first, values("critic", 0))


def on_bitsandbytes(device: str) -> None:
    losses, grads = [], []
    for kernels in (False, True):
        model = base().to(device)
        if kernels:
            assert to_bitsandbytes_(model, torch.float32) == 14
        model = add_adapter(model, "policy", AdapterSettings(rank=4)).train()
        stir(model, "policy")
        before = base_hash(model)
        loss = model(IDS.to(device), labels=IDS.to(device), use_cache=False).loss
        loss.backward()
        assert base_hash(model) == before
        losses.append(loss.detach())
        grads.append([each.grad for each in adapter_parameters(model, "policy").values()])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0.01, atol=1e-4)


def test_adapters_on_bitsandbytes_layers_compute_the_same() -> None:
    on_bitsandbytes("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adapters_on_bitsandbytes_kernels_compute_the_same() -> None:
    on_bitsandbytes("cuda")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        AdapterSettings(rank=0)
    with pytest.raises(ValidationError, match="dropout"):
        AdapterSettings(dropout=1.0)
    with pytest.raises(ValidationError, match="all-linear"):
        AdapterSettings(targets="q_proj")
    with pytest.raises(InputError, match=r"unknown target of adapters 'q_prj'. Did you mean 'q_proj'"):
        add_adapter(base(), "policy", AdapterSettings(targets=("q_prj",)))
    with pytest.raises(InputError, match="float weights"):
        add_adapter(base(), "policy", AdapterSettings(init="loftq"))
    model = add_adapter(base(), "policy", AdapterSettings(rank=4))
    with pytest.raises(InputError, match="already"):
        add_adapter(model, "policy", AdapterSettings())
    with pytest.raises(InputError, match="cannot be merged"):
        model.merge_adapter()
    save_adapter(model, "policy", tmp_path)
    with pytest.raises(InputError, match="no finished adapter"):
        load_adapter(base(), "policy", tmp_path / "none")
    other = copy.deepcopy(tiny.config())
    other.hidden_size, other.intermediate_size = 32, 64
    with pytest.raises(InputError, match="does not fit"):
        load_adapter(Qwen2ForCausalLM(other), "policy", tmp_path)
    with pytest.raises(InputError, match="does not fit"):
        load_adapter(Qwen2ForCausalLM(tiny.config(layers=1)), "policy", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged"):
        load_adapter(base(), "policy", tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document["target_modules"] == sorted(document["target_modules"])
