"""Planned bytes against what transformers, PEFT, bitsandbytes and autograd really hold."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("peft")

from allocator import Allocator, SavedTensors
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlquant.errors import InputError
from rlquant.llm.activations import Activations
from rlquant.llm.architecture import Architecture, architecture_of, built_in, read_architecture
from rlquant.llm.cards import CARDS, find_card
from rlquant.llm.fitting import fits, largest, require_fit
from rlquant.llm.memory import TASKS, Workload, plan_memory
from rlquant.llm.precision import Precision
from rlquant.llm.rollout import planned_rollouts
from rlquant.quant import QuantizedWeight, Scheme

MB, MiB = 10**6, 2**20
QWEN = "Qwen/Qwen2.5-0.5B"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SIZES, num_key_value_heads=4, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=32, attention_bias=True),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2),
    "gemma": GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=32),
    "gemma3": Gemma3TextConfig(**SIZES, num_key_value_heads=4, head_dim=32),
}


def architecture(config: Any) -> Architecture:
    return architecture_of(json.loads(config.to_json_string()), config.model_type)


def trainable(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """With adapters of rank 8 on every linear layer, in the base's dtype."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    lora = LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    model.enable_input_require_grads()
    return model.train()


def unique_bytes(module: Any) -> int:
    return sum(each.nbytes for each in {id(each): each for each in module.parameters()}.values())


# What weights take


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_every_architecture(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    config.save_pretrained(tmp_path)
    model = read_architecture(str(tmp_path))
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.parameters == sum({id(each): each.numel() for each in real.parameters()}.values())
    assert Precision.parse("bf16").weights(model).total == unique_bytes(real)
    assert read_architecture(str(tmp_path / "config.json")).parameters == model.parameters


@pytest.mark.parametrize("name", built_in())
def test_the_configs_that_are_built_in_are_what_transformers_makes_of_them(name: str) -> None:
    settings_ = dict(built_in()[name])
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(settings_.pop("model_type"), **settings_)
        )
    assert read_architecture(name).parameters == sum({id(p): p.numel() for p in real.parameters()}.values())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (QWEN, 494_032_768),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("google/gemma-2b", 2_506_172_416),
    ],
)
def test_parameters_as_the_model_cards_give_them(name: str, parameters: int) -> None:
    assert read_architecture(name).parameters == parameters


@pytest.mark.parametrize(
    ("precision", "megabytes"),
    [
        ("fp32", 1976),
        ("bf16", 988),
        ("int8", 631),
        ("nf4", 474),
        ("nf4-dq", 457),
        ("nf4-dq+embedding=int8", 324),
        ("nf4-dq+embedding=nf4-dq", 255),
    ],
)
def test_qwen_takes_the_bytes_that_are_known(precision: str, megabytes: int) -> None:
    weights = Precision.parse(precision).weights(read_architecture(QWEN))
    assert weights.total / MB == pytest.approx(megabytes, rel=0.01)


def test_the_unquantized_embedding_is_most_of_a_four_bit_model() -> None:
    weights = Precision.parse("nf4-dq").weights(read_architecture(QWEN))
    assert weights.tables / weights.total == pytest.approx(0.60, abs=0.005)


@pytest.mark.parametrize(("precision", "nested"), [("nf4", False), ("nf4-dq", True)])
def test_four_bit_weights_take_what_bitsandbytes_stores(precision: str, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    model = architecture(CONFIGS["llama"])
    expected = 0
    for linear in model.linears:
        weight = torch.randn(linear.outputs, linear.inputs)
        packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
        tensors = [packed, state.absmax, *((state.offset, state.state2.absmax) if nested else ())]
        expected += model.layers * sum(each.nbytes for each in tensors)
    assert Precision.parse(precision).weights(model).blocks == expected


def test_eight_bit_weights_take_what_bitsandbytes_stores() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    model = architecture(CONFIGS["llama"])
    weights = [torch.randn(each.outputs, each.inputs, dtype=torch.float16) for each in model.linears]
    stored = [functional.int8_vectorwise_quant(each)[:2] for each in weights]
    expected = model.layers * sum(each.nbytes for pair in stored for each in pair)
    assert Precision.parse("int8").weights(model).blocks == expected


@pytest.mark.parametrize("scheme", ["int8", "int4-g128", "nf4", "int4-g64-asym", "fp8_e4m3", "nf4-dq"])
def test_unpacking_takes_what_is_planned(scheme: str) -> None:
    packed = QuantizedWeight.from_float(torch.randn(512, 1024), Scheme.parse(scheme))
    packed.caches = False
    with Allocator(packed.buffers()) as allocator:
        packed.cached(torch.bfloat16)
    model = architecture(CONFIGS["qwen2"])
    planned = Precision.parse(f"bf16+embedding={scheme}").unpacked_head(model)
    weights = model.vocabulary * model.hidden
    assert planned / weights == pytest.approx(allocator.peak / (512 * 1024), rel=0.02)


# What activations take


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_keeps_what_autograd_saves(name: str, dtype: torch.dtype) -> None:
    """One block more, so many bytes a token more: embedding, head and what blocks share cancel out."""
    saved, rows, seq = [], 2, 128
    for layers in (2, 3):
        config = copy.deepcopy(CONFIGS[name])
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model = trainable(config, dtype)
        with SavedTensors([*model.parameters(), *model.buffers()]) as kept:
            out = model.base_model.model.model(torch.zeros(rows, seq, dtype=torch.long), use_cache=False)
            saved.append(kept.bytes)
        del out
    planned = Activations(architecture(CONFIGS[name]), dtype.itemsize, dtype.itemsize, rank=8).saved(seq)
    constants = 16 if name.startswith("gemma") else 0  # its norms' weights plus one, not per token
    assert planned <= (saved[1] - saved[0]) / (rows * seq) <= planned + constants


def peak_of_a_step(config: Any, rows: int, seq: int, checkpointing: bool, full_logits: bool) -> int:
    """Bytes at the peak of the second training step, with weights, gradients and Adam's states."""
    model = trainable(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(adapters, foreach=False)
    ids = torch.randint(0, config.vocab_size, (rows, seq))

    def step() -> None:
        if full_logits:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        else:
            loss = model.base_model.model.model(ids, use_cache=False).last_hidden_state[:, -1].float().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    states = [each for state in optimizer.state.values() for each in state.values()]
    gc.collect()
    with Allocator([*model.parameters(), *model.buffers(), *states]) as allocator:
        step()
    return unique_bytes(model) + sum(each.nbytes for each in states) + allocator.peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("task", ["sft", "reward"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "gemma3"])
def test_the_peak_of_a_training_step(name: str, task: str, checkpointing: bool) -> None:
    """sft: with all logits at once. reward: a loss on one token, so that blocks alone decide."""
    rows, seq, full = 4, 256, task == "sft"
    real = peak_of_a_step(CONFIGS[name], rows, seq, checkpointing, full)
    work = Workload(
        task=task,
        batch=rows if full else rows // 2,
        seq=seq,
        rank=8,
        adapters="bf16",
        checkpointing=checkpointing,
        full_logits=full,
    )
    plan = plan_memory(architecture(CONFIGS[name]), Precision.parse("bf16"), work)
    assert plan.peak - plan.parts["workspace"] == pytest.approx(real, rel=0.03)


def test_the_peak_of_generation() -> None:
    config = CONFIGS["llama"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    rows, prompt, new = 8, 256, 16
    ids = torch.randint(0, config.vocab_size, (rows, prompt))
    gc.collect()
    with Allocator([*model.parameters(), *model.buffers()]) as allocator, torch.no_grad():
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    work = Workload(batch=rows, seq=prompt + new, completion=new)
    plan = plan_memory(architecture(config), Precision.parse("bf16"), work)
    held = plan.peak - plan.parts["workspace"]
    assert held == pytest.approx(unique_bytes(model) + allocator.peak, rel=0.1)


@pytest.mark.parametrize("name", ["qwen2", "gemma"])
def test_the_kv_cache_is_what_transformers_keeps(name: str) -> None:
    config, rows, seq = CONFIGS[name], 3, 40
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(rows, seq, dtype=torch.long), past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert Activations(architecture(config)).kv_cache(rows, seq, 16) == real


def test_qwen_keeps_twelve_kilobytes_a_token() -> None:
    assert Activations(read_architecture(QWEN)).kv_cache(1, 1, 16) == 12_288


@pytest.mark.parametrize(
    ("checkpointing", "mebibytes"), [(True, 1015), (False, 5764)], ids=["checkpointing", "no checkpointing"]
)
def test_dpo_as_it_was_measured_on_an_h200(checkpointing: bool, mebibytes: int) -> None:
    """TRL 1.16, NF4 with double quantization, LoRA of rank 16 (which TRL casts to bf16), 4 pairs x 512 tokens."""
    work = Workload(task="dpo", batch=4, seq=512, adapters="bf16", checkpointing=checkpointing)
    plan = plan_memory(read_architecture(QWEN), Precision.parse("nf4-dq"), work, find_card("H200"))
    assert plan.peak / MiB == pytest.approx(mebibytes, rel=0.05)


# What fits


@given(
    task=st.sampled_from(TASKS),
    precision=st.sampled_from(["bf16", "nf4-dq", "int4-g128", "nf4+embedding=int8"]),
    batch=st.integers(1, 64),
    seq=st.integers(1, 8192),
    checkpointing=st.booleans(),
    full=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_more_never_takes_less_and_parts_sum_to_the_peak(
    task: str, precision: str, batch: int, seq: int, checkpointing: bool, full: bool, padded: bool
) -> None:
    model, kind = read_architecture(QWEN), Precision.parse(precision)

    def peak(**changed: int) -> int:
        sizes = {"batch": batch, "seq": seq} | changed
        work = Workload(
            task=task, checkpointing=checkpointing, full_logits=full, padded=padded, adapters="bf16", **sizes
        )
        plan = plan_memory(model, kind, work)
        assert plan.peak == max(plan.stages.values()) == plan.stages[plan.stage]
        assert all(size >= 0 for size in plan.parts.values())
        return plan.peak

    assert peak() <= peak(batch=batch + 1)
    assert peak() <= peak(seq=seq + 2)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("knob", ["batch", "seq"])
def test_the_largest_that_fits_fits_and_one_more_does_not(task: str, knob: Any) -> None:
    model, kind, card = read_architecture("Qwen/Qwen2.5-7B"), Precision.parse("nf4-dq"), find_card("RTX 4090")
    work = Workload(task=task, batch=8, seq=2048)
    most = largest(model, kind, work, card, knob)
    assert most > 0

    def at(value: int) -> bool:
        changed = {"batch": work.batch, "seq": work.seq} | {knob: value}
        return fits(plan_memory(model, kind, Workload(task=task, **changed), card), card)

    assert at(most)
    assert not at(most + 1) or most == model.longest


def test_a_workload_that_does_not_fit_is_refused_with_what_does() -> None:
    model, kind, card = read_architecture("Qwen/Qwen2.5-7B"), Precision.parse("nf4-dq"), find_card("12GB")
    plan = plan_memory(model, kind, Workload(task="dpo", batch=64, seq=2048), card)
    with pytest.raises(
        InputError, match=r"64 x 2048 tokens needs \d.* 12GB has 12.0 GB; this fits: --batch \d"
    ):
        require_fit(plan, card)
    require_fit(plan_memory(model, kind, Workload(task="dpo", batch=1, seq=128), card), card)


def test_a_quantized_cache_is_smaller() -> None:
    model, kind = read_architecture(QWEN), Precision.parse("nf4-dq")
    sizes = [
        plan_memory(model, kind, Workload(batch=64, seq=4096, completion=4000, kv=kv)).parts["kv_cache"]
        for kv in ("bf16", "int8", "int4")
    ]
    assert sizes[0] == 64 * 4096 * 12_288
    assert sizes[0] > 1.7 * sizes[1] > 2.5 * sizes[2]


# The command


def test_the_command_runs_offline_and_loads_no_transformers() -> None:
    code = (
        "import sys\nfrom rlquant import cli\nsys.argv = ['rlquant', 'memory', '--task', 'dpo', '--json']\n"
        "try: cli.main()\nexcept SystemExit as done: assert not done.code\n"
        "assert 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["model"]["parameters"] == 494_032_768
    assert [card["name"] for card in document["cards"]] == [card.name for card in CARDS]
    for row in document["precisions"]:
        assert sum(row["parts"].values()) == row["peak"] < row["needed"]


def test_the_command_shows_tables(rlquant: Callable[..., Any]) -> None:
    done = rlquant("memory", QWEN, "--gpu", "8GB", "--task", "grpo", "--seq", 512, "--batch", 8)
    assert done.status == 0
    for words in ("494 M weights", "nf4-dq", "8GB", "largest batch"):
        assert words in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "dop"), "Did you mean 'dpo'"),
        (("--gpu", "RTX 409"), "Did you mean 'RTX 4090"),
        (("--gpu", "0GB"), "--gpu '0GB' is not a positive quantity"),
        (("--precisions", "nf5"), "Did you mean 'nf4'"),
        (("--precisions", "nf4+head=int8"), "nf4+embedding=int8"),
        (("--embedding", "int77"), "'int77'"),
        (("--dtype", "bf17"), "Did you mean 'bf16'"),
        (("--kv", "int3"), "int3"),
        (("--optimizer", "sgd"), "adamw8bit"),
        (("--adapters", "fp8"), "fp32, bf16"),
        (("--batch", 0), "--batch is 0"),
        (("--seq", 10**6), "32768"),
        (("--seq", 64, "--completion", 65), "--completion is 65"),
        (("no-such-model",), "no file or folder"),
        (("Qwen/Qwen2.5-0.5",), "Qwen/Qwen2.5-0.5B"),
    ],
)
def test_bad_input_is_one_sentence(
    rlquant: Callable[..., Any], arguments: tuple[object, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    done = rlquant("memory", *arguments)
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert says in done.err


def test_folders_that_are_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        read_architecture(str(tmp_path))
    file = tmp_path / "config.json"
    for content, says in (
        ("{", "not JSON"),
        ('{"a": 1}', "model_type"),
        ('{"model_type": "bert", "hidden_size": 8}', "'bert'"),
        ('{"model_type": "llama", "hidden_size": 64}', "num_attention_heads as None"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=says):
            read_architecture(str(file))


def test_a_cache_that_stays_counts_in_training_too() -> None:
    model, kind = read_architecture(QWEN), Precision.parse("nf4-dq")
    fleeting, staying = (
        plan_memory(model, kind, Workload(task="grpo", batch=8, seq=512, rollout=64, cached=cached))
        for cached in (False, True)
    )
    assert fleeting.stage != "generation"
    cache = (
        64 * 512 * 12_288
    )  # bytes of a token of this architecture: 24 layers, 2 heads of 64, keys and values
    assert staying.stages["backward"] - fleeting.stages["backward"] == cache
    assert staying.stages["generation"] == fleeting.stages["generation"]


def test_sums_that_sample_and_their_cache_count() -> None:
    model, kind = read_architecture(QWEN), Precision.parse("nf4-dq")

    def peak(rollouts: str, cache: str | None) -> int:
        work = Workload(task="grpo", batch=8, seq=512, rollout=64, **planned_rollouts(rollouts, cache))
        return plan_memory(model, kind, work).stages["backward"]

    weights = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert peak("rlquant-int8", None) - peak("rlquant", None) == weights
    assert peak("rlquant-dense", None) - peak("rlquant", None) == 2 * weights
    cache = 64 * 512 * 12_288
    assert 0.4 * cache < peak("rlquant", None) - peak("rlquant", "int8") < 0.5 * cache
