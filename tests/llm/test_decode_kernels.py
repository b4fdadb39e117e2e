"""The kernels of a decode step against float64, the model's own layers and the sampling they share numbers with.

On a machine without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlquant.errors import InputError
from rlquant.llm.adapters import AdapterSettings, base_model
from rlquant.llm.decode.steps import draw
from rlquant.llm.decoding import Decoder, State
from rlquant.llm.dense_policy import DensePolicy
from rlquant.llm.engine import Engine, rollout
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.llm.roles import Roles
from rlquant.llm.sampling import Sampling

pytest.importorskip("triton")
bnb = pytest.importorskip("bitsandbytes")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEDY = Sampling(temperature=0)


def packed_(model: nn.Module, *, nested: bool, codes: bool) -> nn.Module:
    """bitsandbytes' own layers in the blocks, or float layers with what their codes stand for."""
    for part in list(model.model.layers.modules()):
        for name, layer in list(part.named_children()):
            if type(layer) is nn.Linear:
                weight, state = bnb.functional.quantize_4bit(
                    layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=nested
                )
                if codes:
                    new = bnb.nn.Linear4bit(
                        layer.in_features, layer.out_features, quant_type="nf4", device="meta"
                    )
                    new.weight = bnb.nn.Params4bit(
                        weight, requires_grad=False, quant_state=state, bnb_quantized=True
                    )
                    new.bias = layer.bias
                    setattr(part, name, new)
                else:
                    layer.weight.data = bnb.functional.dequantize_4bit(weight, state)
    return model


def model_of(family: str, *, heads: int = 4, kv_heads: int = 2) -> Any:
    sizes = {
        "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 1, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": 260, "max_position_embeddings": 512, "initializer_range": 0.15,
        "head_dim": 32,
    }  # fmt: skip
    torch.manual_seed(5)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes)),
    }
    model = made[family]()
    for each in model.parameters():  # biases and norms that do something
        if each.ndim == 1:
            each.data += 0.3 * torch.randn_like(each)
    return model.eval().to(DEVICE)


def roles_of(
    family: str, *, codes: bool, nested: bool = True, packed: bool = True, rank: int = 4, **sizes: int
) -> Roles:
    model = model_of(family, **sizes)
    if packed:
        packed_(model, nested=nested, codes=codes)
    roles = Roles(LanguageModel(model, tiny.tokenizer(), "tiny", "fp32"))
    roles.add("policy", AdapterSettings(rank=rank))
    generator = torch.Generator().manual_seed(3)
    for name, each in roles.parameters("policy").items():
        if "lora_B" in name:
            each.data.copy_(torch.randn(each.shape, generator=generator) / 10)
    roles.model.eval()
    return roles


STEPS = 3


def drawn_by(
    roles: Roles, *, fused: bool, slots: int, length: int, sampling: Sampling, scheme: str | None = None
) -> list[torch.Tensor]:
    """What steps draw, and the state they leave."""
    from rlquant.llm.decode.step import FusedStep

    decoder = Decoder(roles.model)
    cache = decoder.cache(slots, length, scheme)
    generator = torch.Generator().manual_seed(9)
    rows, positions = torch.arange(slots)[:, None], torch.arange(length).expand(slots, -1)
    for layer in range(len(decoder.layers)):
        new = (torch.randn(slots, length, 2, 32, generator=generator) for _ in range(2))
        cache.write(
            layer, rows.to(DEVICE), positions.to(DEVICE), *(each.to(DEVICE, decoder.dtype) for each in new)
        )
    state = State.of(slots, cache.keys.device)
    state.tokens.copy_(torch.randint(0, 260, (slots,), generator=generator))
    state.positions.copy_(torch.randint(0, length - STEPS - 1, (slots,), generator=generator))
    state.positions[0] = length - STEPS - 1
    state.seeds.copy_(torch.arange(slots) * 77)
    drawn = torch.zeros(STEPS, 3, slots, device=cache.keys.device)
    step = FusedStep(decoder, cache, state, sampling) if fused else None
    for each in drawn:
        if step is not None:
            step(slots, each)
        else:
            ids, positions = state.tokens[:, None], state.positions[:, None]
            hidden = decoder.hidden(ids, positions, cache, None, length)
            each.copy_(draw(decoder.logits(hidden[:, 0]), sampling, state, slice(slots), length))
    kept = [each for layer in range(len(decoder.layers)) for each in cache.read(layer, slice(slots), length)]
    return [each.cpu() for each in (drawn, *kept, state.positions, state.places)]


@pytest.mark.parametrize(
    ("family", "settings", "sampling", "slots", "length"),
    [
        ("qwen2", {}, GREEDY, 3, 40),
        ("qwen2", {"nested": False, "rank": 20}, Sampling(), 1, 530),
        ("llama", {"heads": 8, "kv_heads": 2}, Sampling(temperature=0.7), 2, 70),
        ("qwen3", {"packed": False}, Sampling(), 18, 30),
    ],
)
def test_steps_are_those_of_the_layers(
    family: str, settings: dict[str, Any], sampling: Sampling, slots: int, length: int
) -> None:
    """Float32: the same tokens, the same cache, the same log-probabilities up to rounding."""
    with torch.no_grad():
        layers, kernels = (
            drawn_by(
                roles_of(family, codes=fused, **settings),
                fused=fused,
                slots=slots,
                length=length,
                sampling=sampling,
            )
            for fused in (False, True)
        )
    assert torch.equal(layers[0][:, 0], kernels[0][:, 0])
    assert (kernels[0][:, 2] == 1).all()
    for one, other in zip(layers, kernels, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_states_in_float16_may_be_large() -> None:
    """With its weights but without its factor, what a norm gives would be beyond float16."""
    roles = roles_of("qwen2", codes=False, packed=False)
    with torch.no_grad():
        base = base_model(roles.model)
        base.model.embed_tokens.weight *= 50_000.0
        base.lm_head.weight = nn.Parameter(base.model.embed_tokens.weight / 50_000)
        for norm in (base.model.layers[0].input_layernorm, base.model.norm):
            norm.weight.fill_(10.0)
        for name, each in base.named_parameters():
            if "lora" not in name:
                each.data = each.data.half()
        settings: dict[str, Any] = {"slots": 3, "length": 40, "sampling": GREEDY}
        layers, kernels = (drawn_by(roles, fused=fused, **settings) for fused in (False, True))
    assert (kernels[0][:, 2] == 1).all()
    for one, other in zip(layers, kernels, strict=True):
        torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_dense_policies_have_steps_too(kind: Any) -> None:
    roles = roles_of("qwen2", codes=False)
    settings: dict[str, Any] = {"slots": 2, "length": 32, "sampling": GREEDY}
    with torch.no_grad():
        exact = drawn_by(roles, fused=False, **settings)
        with DensePolicy(roles.model, kind).acting():
            layers = drawn_by(roles, fused=False, **settings)
            kernels = drawn_by(roles, fused=True, **settings)
    close = 1e-4 if kind == "float" else 0.3
    torch.testing.assert_close(kernels[0][:, 1], exact[0][:, 1], rtol=close, atol=close)
    for one, other in zip(layers, kernels, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_models_in_int8_have_steps_too() -> None:
    lm = LanguageModel(model_of("llama"), tiny.tokenizer(), "tiny", "fp32")
    roles = Roles(quantize_model_(lm, Plan.parse("int8")))
    roles.add("policy", AdapterSettings(rank=4))
    settings: dict[str, Any] = {"slots": 3, "length": 32, "sampling": Sampling()}
    with torch.no_grad():
        for name, each in roles.parameters("policy").items():
            if "lora_B" in name:
                each.data.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(3)) / 10)
        layers, kernels = (drawn_by(roles, fused=fused, **settings) for fused in (False, True))
    for one, other in zip(layers, kernels, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheme",
    # Triton's interpreter rounds what carries into the exponent to half of it (31.8 to 16), so fp8 is for a GPU.
    [pytest.param("fp8_e4m3", marks=pytest.mark.gpu), "int8", "int4"],
)
def test_quantized_caches_are_written_and_read_alike(scheme: str) -> None:
    roles = roles_of("qwen2", packed=False, codes=False)
    settings: dict[str, Any] = {"slots": 2, "length": 70, "sampling": GREEDY, "scheme": scheme}
    with torch.no_grad():
        layers, kernels = (drawn_by(roles, fused=fused, **settings) for fused in (False, True))
    for one, other in zip(layers, kernels, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_logits_that_are_no_numbers_are_told() -> None:
    roles = roles_of("llama", packed=False, codes=False)
    with torch.no_grad():
        roles.model.get_output_embeddings().weight[200] = torch.nan
        drawn = drawn_by(roles, fused=True, slots=2, length=10, sampling=Sampling())[0]
    assert (drawn[0, 2] == 0).all()


def test_what_the_kernels_do_not_know_is_refused() -> None:
    from rlquant.llm.decode.step import FusedStep

    def step(roles: Roles, sampling: Sampling = GREEDY) -> None:
        decoder = Decoder(roles.model)
        FusedStep(decoder, decoder.cache(1, 8), State.of(1, roles.lm.device), sampling)

    roles = roles_of("qwen2", packed=False, codes=False)
    with pytest.raises(InputError, match="samples from the whole distribution"):
        step(roles, Sampling(top_k=3))
    base_model(roles.model).model.layers[0].mlp.act_fn = nn.GELU()
    with pytest.raises(InputError, match="multiplies by SiLU, not by GELU"):
        step(roles)
    base_model(roles.model).model.layers[0].self_attn.head_dim = 48
    with pytest.raises(InputError, match="heads of 32, 64, 128 or 256 values, not 48"):
        step(roles)
    lm = LanguageModel(model_of("qwen2"), tiny.tokenizer(), "tiny", "fp32")
    quantized = Roles(quantize_model_(lm, Plan.parse("int4-g32")))
    with pytest.raises(InputError, match="there is no fused step for layers in int4-g32"):
        step(quantized)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_graphs_follow_the_adapter(scheme: str | None) -> None:
    """Tokens and log-probabilities are those of a forward pass over all of the text, before and after updates."""
    roles = roles_of("qwen2", codes=True)
    prompts = [[5, 9, 200], [77], [3, 1, 4, 1, 5, 9, 2, 6], [250, 8]]
    seen = []
    with roles.acting("policy"), torch.no_grad():
        engine = Engine(roles.model, slots=3, length=64, sampling=GREEDY, cache=scheme)
        for _ in range(3):
            made = sorted(engine.complete(prompts, max_new_tokens=21), key=lambda each: each.prompt)
            assert engine.steps.fused is not None
            assert engine.steps.graphs
            for prompt, each in zip(prompts, made, strict=True):
                logits = roles.model(torch.tensor([prompt + each.ids], device=DEVICE)).logits[0].float()
                found = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
                close = 1e-3 if scheme is None else 0.5
                exact = found.gather(1, torch.tensor(each.ids, device=DEVICE)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(each.log_probs), exact.cpu(), rtol=close, atol=close)
                assert (found.amax(dim=-1) - exact < close).all()
            seen.append([each.ids for each in made])
            for each in roles.parameters("policy").values():
                each.data.mul_(1.7)
    assert seen[0] != seen[1]
    assert engine.prefill.graphs


@pytest.mark.gpu
def test_layers_that_the_kernels_do_not_know_go_by_themselves() -> None:
    roles = roles_of("qwen2", codes=True)
    sampling = Sampling(top_k=5)
    with roles.acting("policy"), torch.no_grad(), pytest.warns(UserWarning, match="the model's own layers"):
        made = list(rollout(roles.model, [[5, 9], [7, 7, 7]], n=2, max_new_tokens=9, sampling=sampling))
    assert [len(each.ids) for each in made] == [9] * 4


@pytest.mark.gpu
def test_kernels_that_do_not_fit_a_gpu_are_gone_without(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from rlquant.llm.decode.step import FusedStep

    def too_large(*_: Any) -> None:
        raise OutOfResources(120_000, 101_376, "shared memory")

    roles = roles_of("qwen2", codes=True)
    prompts = [[5, 9], [7, 7, 7]]
    with roles.acting("policy"), torch.no_grad():
        fused = [each.ids for each in rollout(roles.model, prompts, max_new_tokens=9, sampling=GREEDY)]
        monkeypatch.setattr(FusedStep, "_step", too_large)
        with pytest.warns(UserWarning, match="the model's own layers.*shared memory"):
            made = [each.ids for each in rollout(roles.model, prompts, max_new_tokens=9, sampling=GREEDY)]
    assert made == fused
