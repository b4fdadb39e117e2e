"""Weights that stay in their files: the same model and the same codes as transformers loads, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from rlquant.errors import InputError
from rlquant.llm.artifact import load_artifact, save_artifact
from rlquant.llm.calibration import windows_of
from rlquant.llm.load import load
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.quant import weight_bytes

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "lm_large.py"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
}


def sharded(folder: Path, *, tied: bool) -> Path:
    tiny.model(tied=tied).save_pretrained(folder, max_shard_size="100KB")
    tiny.tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def calibration(lm: LanguageModel) -> torch.Tensor:
    return windows_of([lm.tokens(tiny.TEXT)[20_000:]], windows=10, length=48, seed=0)


def is_whole(model: Any) -> bool:
    return not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def assert_same(model: Any, other: Any) -> None:
    """Weights, buffers, what is tied, and what their config.json would say."""
    mine, theirs = (
        {**each.state_dict(), **dict(each.named_buffers(remove_duplicate=False))} for each in (model, other)
    )
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert weight_bytes(model) == weight_bytes(other)
    assert model.training == other.training
    assert [each.requires_grad for each in model.parameters()] == [
        each.requires_grad for each in other.parameters()
    ]
    assert model.config.to_json_string() == other.config.to_json_string()
    assert model.generation_config.to_json_string() == other.generation_config.to_json_string()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("save", [tiny.saved, sharded])
@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("int4-g32", "rtn", "bf16"),
        ("int3-g32+embedding=int8", "gptq", "fp32"),
        ("int4-g32+layers.0.*=int8", "awq", "bf16"),
        ("w8a8+embedding=nf4", "rtn", "fp16"),
    ],
)
def test_the_codes_are_those_of_the_model_loaded_whole(
    save: Callable[..., Path], tied: bool, name: str, method: str, dtype: str, tmp_path: Path
) -> None:
    save(tmp_path, tied=tied)
    whole, lazy = (load(str(tmp_path), dtype=dtype, lazy=lazy) for lazy in (False, True))
    assert all(parameter.is_meta for parameter in lazy.model.parameters())
    assert lazy.parameters == whole.parameters
    assert lazy.sha256 == whole.sha256
    assert weight_bytes(lazy.model) == weight_bytes(whole.model)
    done = [
        quantize_model_(lm, Plan.parse(name, method), calibration=calibration(lm)) for lm in (whole, lazy)
    ]
    assert done[1].unread is None
    assert is_whole(done[1].model)
    assert_same(done[1].model, done[0].model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_family_is_read_as_transformers_reads_it(family: str, dtype: str, tmp_path: Path) -> None:
    kind, model = FAMILIES[family]
    torch.manual_seed(0)
    model(kind(**SIZES)).bfloat16().save_pretrained(tmp_path)
    lm = load(str(tmp_path), dtype=dtype, lazy=True)
    assert lm.unread is not None
    lm.read_(lm.model)
    stock = model.from_pretrained(
        tmp_path, dtype=getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[dtype])
    )
    assert_same(lm.model, stock)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, stock(ids).logits)


def test_an_artifact_of_gemma_keeps_the_factor_of_its_embedding(tmp_path: Path) -> None:
    kind, model = FAMILIES["gemma"]
    torch.manual_seed(0)
    model(kind(**SIZES)).save_pretrained(tmp_path / "floats")
    lm = quantize_model_(load(str(tmp_path / "floats"), dtype="fp32", lazy=True), Plan.parse("int8"))
    save_artifact(lm, tmp_path / "small", dtype="fp32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load_artifact(tmp_path / "small").model(ids).logits, lm.model(ids).logits)
    with pytest.raises(InputError, match=r"GemmaTextScaledWordEmbedding.*'\+embedding=…'"):
        quantize_model_(load(str(tmp_path / "floats")), Plan.parse("int8+embedding=int8"))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_resumed_run_reads_on(method: str, tmp_path: Path) -> None:
    from rlquant.runs import RunFolder

    folder, plan = str(tiny.saved(tmp_path / "model")), Plan.parse("int4-g32", method)

    def stop(done: int, wanted: int) -> None:
        raise KeyboardInterrupt

    for progress in (stop, lambda done, wanted: None):
        lm = load(folder, lazy=True)
        store = RunFolder(tmp_path / "run", {})
        try:
            lm = quantize_model_(lm, plan, calibration=calibration(lm), store=store, progress=progress)
        except KeyboardInterrupt:
            continue
    whole = load(folder)
    assert_same(lm.model, quantize_model_(whole, plan, calibration=calibration(whole)).model)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("lazy", [True, False])
def test_a_missing_tensor_is_named_before_anything_is_done(lazy: bool, tmp_path: Path) -> None:
    rewrite(tiny.saved(tmp_path), lambda tensors: tensors.pop(UP))
    with pytest.raises(InputError, match=f"incomplete: the tensor {UP} is missing"):
        load(str(tmp_path), lazy=lazy)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"model-00002-of-\d+\.safetensors is damaged or missing"),
        (cut, r"model-00002-of-\d+\.safetensors is damaged or missing"),
    ],
)
def test_a_damaged_shard_is_named(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path, tied=True)
    damage(next(folder.glob("model-00002-*")))
    with pytest.raises(InputError, match=message):
        load(str(folder), lazy=True)


@pytest.mark.parametrize("value", [torch.zeros(128, 32), torch.zeros(128, 64, dtype=torch.int8)])
def test_a_tensor_that_does_not_fit_is_named(value: torch.Tensor, tmp_path: Path) -> None:
    rewrite(tiny.saved(tmp_path), lambda tensors: tensors.update({UP: value}))
    with pytest.raises(InputError, match=f"{UP} does not fit the model's config.json: it is"):
        load(str(tmp_path), lazy=True)


def test_what_is_not_of_the_model_does_not_matter(tmp_path: Path) -> None:
    tiny.saved(tmp_path)
    whole = load(str(tmp_path))
    rewrite(
        tmp_path, lambda each: each.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    lm = load(str(tmp_path), lazy=True)
    assert lm.unread is not None
    lm.read_(lm.model)
    assert_same(lm.model, whole.model)


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    for name in [each for each in tensors if each.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def untied(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize("change", [renamed, untied])
def test_what_transformers_has_to_sort_out_is_loaded_whole(
    change: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path
) -> None:
    rewrite(tiny.saved(tmp_path), change)
    lm = load(str(tmp_path), dtype="fp32", lazy=True)
    assert lm.unread is None
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(lm.model, stock)


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "models--some--one"
    sharded(cache / "snapshots" / ("0" * 40), tied=False)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    whole, lazy = (load("some/one@main", dtype="fp32", lazy=lazy) for lazy in (False, True))
    assert lazy.unread is not None
    assert lazy.source == "some/one@main"
    assert lazy.tokens("12") == whole.tokens("12")
    lazy.read_(lazy.model)
    assert_same(lazy.model, whole.model)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_a_model_is_quantized_in_less_memory_than_it_takes(tmp_path: Path) -> None:
    sizes = {
        **SIZES,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 32,
        "vocab_size": 8192,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2", **sizes, "num_attention_heads": 12})
    )
    paths = ["--work", tmp_path, "--out", tmp_path / "out.md", "--json", tmp_path / "out.json"]
    plans = ["--plans", "int4-g128:rtn,w4a8-g128:rtn", "--windows", 2, "--length", 64]
    command = [sys.executable, BENCHMARK, tmp_path / "config.json", *plans, *paths]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["floats"] > 400_000_000
    for row in found["rows"]:
        assert row["peak"] - row["before"] < found["floats"], row
