"""Rollouts beside transformers' generate, its logits and its filters."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlquant.errors import InputError
from rlquant.llm.adapter_layer import adapter_layers
from rlquant.llm.adapters import AdapterSettings
from rlquant.llm.decode import prefill
from rlquant.llm.dense_policy import DensePolicy
from rlquant.llm.engine import Completion, rollout
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.llm.roles import Roles
from rlquant.llm.rollout import EngineGenerate
from rlquant.llm.sampling import Sampling, choose, exponential, stream
from rlquant.llm.timed_engine import TimedEngine

TEXTS = ("3 and 4 make ", "1", "15 and 27 make 42. 8 and ", "2 and")
GREEDY = Sampling(temperature=0)


def model_of(family: str) -> Any:
    """Trained, or of random weights that are large enough for clear preferences."""
    if family == "qwen2":
        return copy.deepcopy(tiny.model()).eval()
    sizes = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 260, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(5)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)),
    }
    return made[family]().eval()


def prompts() -> list[list[int]]:
    return [tiny.tokenizer()(text)["input_ids"] for text in TEXTS]


def trained_roles() -> Roles:
    """A packed base with an adapter that changes something."""
    lm = LanguageModel(copy.deepcopy(tiny.model()), tiny.tokenizer(), "tiny", "fp32")
    roles = Roles(quantize_model_(lm, Plan.parse("nf4")))
    roles.add("policy", AdapterSettings(rank=4))
    generator = torch.Generator().manual_seed(3)
    for name, each in roles.parameters("policy").items():
        if "lora_B" in name:
            each.data.copy_(torch.randn(each.shape, generator=generator) / 20)
    roles.model.eval()
    return roles


@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
def test_greedy_tokens_are_those_of_generate(family: str, slots: int) -> None:
    model = model_of(family)
    found = {
        each.prompt: each
        for each in rollout(model, prompts(), max_new_tokens=20, sampling=GREEDY, slots=slots)
    }
    assert len(found) == len(TEXTS)
    for number, prompt in enumerate(prompts()):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found[number].ids == expected[0, len(prompt) :].tolist()
        assert not found[number].ended


def test_a_packed_embedding_and_head() -> None:
    lm = LanguageModel(copy.deepcopy(tiny.model()), tiny.tokenizer(), "tiny", "fp32")
    model = quantize_model_(lm, Plan.parse("nf4+embedding=int8")).model.eval()
    for each in rollout(model, prompts(), max_new_tokens=9, sampling=GREEDY):
        ids = torch.tensor([prompts()[each.prompt]])
        expected = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert each.ids == expected[0, ids.shape[1] :].tolist()


def test_prompts_that_are_alike_or_many_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = model_of("qwen2"), prompts()
    expected = {each.prompt: each.ids for each in rollout(model, given, max_new_tokens=6, sampling=GREEDY)}
    monkeypatch.setattr(prefill, "_EAGER", 30)
    read: list[int] = []
    monkeypatch.setattr(
        prefill.Prefill,
        "__call__",
        lambda self, texts, slots, of=prefill.Prefill.__call__: (
            read.append(len(texts)) or of(self, texts, slots)
        ),
    )
    made = {
        each.prompt: each.ids for each in rollout(model, [*given, *given], max_new_tokens=6, sampling=GREEDY)
    }
    assert made == expected | {number + len(given): ids for number, ids in expected.items()}
    assert sum(read) == len(given)
    assert len(read) > 1


def test_a_cache_of_just_the_length() -> None:
    model, given = model_of("qwen2"), prompts()
    length = max(map(len, given)) + 5
    loose, tight = (
        {
            each.prompt: each.ids
            for each in rollout(model, given, max_new_tokens=5, sampling=GREEDY, length=size)
        }
        for size in (length + 40, length)
    )
    assert loose == tight


def test_stop_tokens_end_a_completion() -> None:
    model, dot = model_of("qwen2"), tiny.tokenizer()(".")["input_ids"][0]
    found = list(rollout(model, prompts(), max_new_tokens=20, sampling=GREEDY, stop=[dot]))
    assert all(each.ended and each.ids[-1] == dot and dot not in each.ids[:-1] for each in found)
    assert {len(each.log_probs) - len(each.ids) for each in found} == {0}


def test_log_probabilities_are_those_of_training() -> None:
    roles = trained_roles()
    with roles.acting("policy"):
        found = list(
            rollout(roles.model, prompts(), n=2, max_new_tokens=9, sampling=Sampling(temperature=0.7))
        )
    assert len({tuple(each.ids) for each in found}) > 4
    for each in found:
        ids = torch.tensor([[*prompts()[each.prompt], *each.ids]])
        expected = roles.policy(ids, torch.ones_like(ids, dtype=torch.bool), last=9, temperature=0.7)
        np.testing.assert_allclose(each.log_probs, expected[0].tolist(), rtol=1e-4, atol=1e-4)


def test_dense_weights_sample_as_base_and_adapter() -> None:
    """And leave the layers as they were, whatever happens in between."""
    roles = trained_roles()
    before = roles.base_hash()

    def completed(dense: Any) -> list[Completion]:
        return EngineGenerate(roles, max_new_tokens=9, temperature=0.7, dense=dense)(prompts(), seed=3)

    packed, dense = completed(None), completed("float")
    assert [each.ids for each in packed] == [each.ids for each in dense]
    for one, other in zip(packed, dense, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-3, atol=1e-3)
    for each in roles.parameters("policy").values():
        each.data.mul_(1.5)
    assert [each.log_probs for each in completed("float")] != [each.log_probs for each in dense]  # built anew
    with pytest.raises(ZeroDivisionError), DensePolicy(roles.model).acting():
        1 / 0  # noqa: B018
    assert all(layer.dense is None for _, layer in adapter_layers(roles.model))
    assert roles.base_hash() == before
    names = list(roles.model.state_dict())
    rounded = completed("int8")
    with DensePolicy(roles.model, "int8").acting():
        assert list(roles.model.state_dict()) == names
    assert rounded != completed("float") == completed("float")
    for one, other in zip(rounded, completed("float"), strict=True):
        np.testing.assert_allclose(one.log_probs[0], other.log_probs[0], atol=0.1)


def test_doras_sums_have_other_norms() -> None:
    roles = Roles(LanguageModel(copy.deepcopy(tiny.model()), tiny.tokenizer(), "tiny", "fp32"))
    roles.add("policy", AdapterSettings(rank=2, dora=True))
    with (
        pytest.raises(InputError, match="a DoRA adapter cannot be sampled from"),
        DensePolicy(roles.model).acting(),
    ):
        pass
    assert all(layer.dense is None for _, layer in adapter_layers(roles.model))


def test_completions_do_not_depend_on_what_is_beside_them() -> None:
    model = model_of("qwen2")

    def completed(slots: int) -> dict[tuple[int, int], list[int]]:
        made = rollout(model, prompts(), n=3, max_new_tokens=12, seed=7, slots=slots, stop=[13, 46])
        return {(each.prompt, each.number): each.ids for each in made}

    together = completed(64)
    assert len(together) == 12
    assert completed(1) == completed(5) == together
    assert len({tuple(ids) for ids in together.values()}) > 8
    other = rollout(model, prompts(), n=3, max_new_tokens=12, seed=8, stop=[13, 46])
    assert {(each.prompt, each.number): each.ids for each in other} != together


def test_numbers_are_exponential_and_independent() -> None:
    found = exponential(torch.arange(200) * 7919, torch.arange(200) % 7, 1000).double()
    assert (found > 0).all()
    counts = np.histogram((1 - found.neg().exp()).numpy(), bins=100, range=(0, 1))[0]
    assert np.square(counts - 2000).sum() / 2000 < 160  # chi-square of 99 degrees: 148 at a thousandth
    for one, other in ((found[:, :-1], found[:, 1:]), (found[:-1], found[1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.01
    least = exponential(torch.arange(300), torch.zeros(300, dtype=torch.int64), 20_000).min(dim=1).values
    assert 0.8 < least.mean().item() * 20_000 < 1.2  # of a race of so many the winner's is exponential too
    assert 0.7 < least.std().item() * 20_000 < 1.3


def test_numbers_are_splitmix64_and_lowbias32() -> None:
    """Beside Python's integers of any size and its logarithm."""
    mask, half = 2**64 - 1, 2**32 - 1

    def splitmix(seed: int, place: int) -> int:
        x = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    def lowbias(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & half
        x = ((x ^ (x >> 15)) * 0x846CA68B) & half
        return x ^ (x >> 16)

    cases = [(0, 0), (1, 0), (2**32 - 1, 3), (2**62, 999), (12345, 2**31)]
    seeds, places = (torch.tensor(column) for column in zip(*cases, strict=True))
    assert [each & mask for each in stream(seeds, places).tolist()] == [splitmix(*case) for case in cases]
    expected = []
    for case in cases:
        bits = splitmix(*case)
        for token in range(3000):
            mixed = lowbias(lowbias(token ^ (bits & half)) ^ (bits >> 32))
            expected.append(-math.log1p(-(mixed + 0.5) / 2**32))
    found = exponential(seeds, places, 3000).flatten().double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        (Sampling(), None),
        (Sampling(top_k=5), TopKLogitsWarper(5)),
        (Sampling(top_p=0.6), TopPLogitsWarper(0.6)),
        (Sampling(min_p=0.2), MinPLogitsWarper(0.2)),
        (Sampling(temperature=0.5), None),
    ],
)
def test_tokens_come_as_often_as_they_should(sampling: Sampling, warper: Any) -> None:
    logits = 1.5 * torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    scaled = logits / sampling.temperature
    expected = (scaled if warper is None else warper(None, scaled)).softmax(dim=-1)[0].double().numpy()
    count = 40_000
    tokens, log_probs = choose(
        logits.expand(count, -1), sampling, torch.arange(count), torch.zeros(count, dtype=torch.int64)
    )
    found = np.bincount(tokens.numpy(), minlength=40) / count
    assert found[expected == 0].sum() == 0
    assert np.abs(found - expected).max() < 0.01
    torch.testing.assert_close(log_probs, scaled.log_softmax(dim=-1)[0][tokens])


@pytest.mark.parametrize(("scheme", "close"), [("int8", 0.1), ("fp8_e4m3", 0.5), ("int4", 2.0)])
def test_quantized_caches_change_little(scheme: str, close: float) -> None:
    """Log-probabilities beside a forward pass over all of the text; the coarser the cache, the farther."""
    model = model_of("qwen2")
    for each in rollout(model, prompts(), max_new_tokens=12, seed=3, cache=scheme):
        prompt = prompts()[each.prompt]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + each.ids])).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(dim=-1).gather(1, torch.tensor(each.ids)[:, None])[:, 0]
        off = (exact - torch.tensor(each.log_probs)).abs().max().item()
        assert 0 < off < close


def test_bad_input() -> None:
    model, given = model_of("qwen2"), prompts()
    with pytest.raises(
        InputError, match="prompt 2 has 25 tokens, and with 10 new ones is longer than the 30"
    ):
        rollout(model, given, max_new_tokens=10, length=30)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        rollout(model, [[]], max_new_tokens=10)
    with pytest.raises(InputError, match="must be at least 1"):
        rollout(model, given, max_new_tokens=0)
    with pytest.raises(InputError, match="unknown KV-cache scheme 'int5'"):
        rollout(model, given, max_new_tokens=2, cache="int5")
    with pytest.raises(InputError, match=r"top_p is 0\.0: it must be above 0"):
        Sampling(top_p=0.0)
    assert list(rollout(model, [], max_new_tokens=3)) == []
    model.config.sliding_window = 8
    with pytest.raises(InputError, match="no rollouts for a qwen2 with a sliding window"):
        rollout(model, given, max_new_tokens=10)
    model.config.model_type = "gpt2"
    with pytest.raises(InputError, match="no rollouts for the architecture 'gpt2': llama"):
        rollout(model, given, max_new_tokens=10)


def test_logits_that_are_no_numbers_name_the_sequence() -> None:
    model = model_of("qwen2")
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny.tokenizer()("7")["input_ids"][0]] = torch.nan
    found = rollout(model, [[51], [55]], max_new_tokens=4, sampling=GREEDY)
    with pytest.raises(InputError, match=r"logits of token \d+ of completion 0 of prompt \d+ are not finite"):
        list(found)


def test_the_engine_times_each_of_its_steps() -> None:
    timed = TimedEngine(model_of("qwen2"), slots=3, length=60)
    times = timed.timed([prompts()[0]] * 3, 9)
    assert times.shape == (9,)
    assert (times > 0).all()


def test_models_without_adapters_do_without_peft() -> None:
    code = "import sys, rlquant.llm.evaluate, rlquant.languages; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
