"""Checkpoints of GPTQ, AWQ and compressed-tensors: decoded by loops that follow the formats' descriptions, written and
read back, damaged, and (slow) loaded by the libraries themselves."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig
from typer.testing import CliRunner

from rlquant.cli import app
from rlquant.errors import InputError
from rlquant.llm.artifact import save_artifact
from rlquant.llm.checkpoints import read_checkpoint, write_checkpoint
from rlquant.llm.checkpoints.affine_linear import AffineLinear, int_scheme
from rlquant.llm.checkpoints.gptq import GPTQ
from rlquant.llm.checkpoints.shards import LayerTensors, Shards
from rlquant.llm.checkpoints.words import from_words, to_words
from rlquant.llm.load import load
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.quant import QuantEmbedding, QuantLinear, Scheme
from tests.llm import tiny

Q_PROJ = "model.layers.0.self_attn.q_proj"
PEER = Path(__file__).parents[2] / "benchmarks" / "checkpoints_peer.py"
SCHEMES = [
    ("gptq", "int4-g32"),
    ("gptq", "int4-g32-asym"),
    ("gptq", "int8"),
    ("gptq", "int3-g64"),
    ("gptq", "int2-g32-asym"),
    ("autogptq", "int4-g32"),
    ("awq", "int4-g32-asym"),
    ("awq", "int4"),
    ("compressed-tensors", "int4-g32"),
    ("compressed-tensors", "int4-g32-asym"),
    ("compressed-tensors", "int8"),
    ("compressed-tensors", "int2-g32"),
    ("compressed-tensors", "w8a8"),
    ("compressed-tensors", "w8a8-dynamic"),
    ("compressed-tensors", "int4-g32+layers.*.mlp.down_proj=int8+layers.0.self_attn.q_proj=fp32"),
]


def tokens() -> Tensor:
    return torch.tensor(tiny.tokenizer()(tiny.TEXT)["input_ids"][-96:])[None]


@cache
def _quantized(scheme: str, method: str, tied: bool) -> LanguageModel:
    lm = LanguageModel(copy.deepcopy(tiny.model(tied=tied)), tiny.tokenizer(), "tiny", "fp32")
    plan = Plan.parse(scheme, method)
    return quantize_model_(lm, plan, calibration=tokens() if plan.needs_calibration else None)


def quantized(scheme: str, method: str = "rtn", *, tied: bool = True) -> LanguageModel:
    lm = _quantized(scheme, method, tied)
    return lm.but(model=copy.deepcopy(lm.model))


def written(folder: Path, form: str = "gptq", scheme: str = "int4-g32") -> Path:
    write_checkpoint(quantized(scheme), folder, form)
    return folder


def logits(lm: LanguageModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = lm.model(tokens()).logits
    return found


def in_float16(lm: LanguageModel) -> LanguageModel:
    """With its scales rounded to float16."""
    for part in lm.model.modules():
        if isinstance(part, QuantLinear):
            part.packed.scale = part.packed.scale.half().float()
    return lm


def edit(folder: Path, change) -> None:
    """Change the tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(document))


# ---------------------------------------------------------------- the formats, decoded bit by bit


def bits_of(word: int, start: int, count: int) -> int:
    return (word & 0xFFFFFFFF) >> start & (2**count - 1)


def stream(words: list[int], bits: int, count: int) -> list[int]:
    """Codes of a row of words: one number, least significant bits first."""
    number = sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [number >> (bits * k) & (2**bits - 1) for k in range(count)]


def gptq_weight(tensors: dict[str, Tensor], bits: int, added: int) -> np.ndarray:
    """``[out, in]`` by the formula of AutoGPTQ; ``added`` to zero points as they are stored."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, g_idx = tensors["scales"].double().numpy(), tensors["g_idx"].tolist()
    inputs, outputs = len(g_idx), scales.shape[1]
    zeros = [stream(row, bits, outputs) for row in qzeros]
    weight = np.zeros((outputs, inputs))
    for n in range(outputs):
        codes = stream([row[n] for row in qweight], bits, inputs)
        for k, code in enumerate(codes):
            weight[n, k] = scales[g_idx[k], n] * (code - (zeros[g_idx[k]][n] + added))
    return weight


def awq_weight(tensors: dict[str, Tensor], group_size: int) -> np.ndarray:
    """``[out, in]`` by the formula of AutoAWQ's GEMM."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales = tensors["scales"].double().numpy()
    inputs, outputs = len(qweight), scales.shape[1]
    place = {column: nibble for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    weight = np.zeros((outputs, inputs))
    for k in range(inputs):
        for n in range(outputs):
            group = k // group_size
            code = bits_of(qweight[k][n // 8], 4 * place[n % 8], 4)
            zero = bits_of(qzeros[group][n // 8], 4 * place[n % 8], 4)
            weight[n, k] = scales[group, n] * (code - zero)
    return weight


def packed_weight(tensors: dict[str, Tensor], bits: int, group_size: int) -> np.ndarray:
    """``[out, in]`` by the formula of compressed-tensors, whose codes are signed and stored with an offset."""
    outputs, inputs = tensors["weight_shape"].tolist()
    scales, offset = tensors["weight_scale"].double().numpy(), 2 ** (bits - 1)
    columns = tensors.get("weight_zero_point", torch.zeros(0, scales.shape[1])).t().tolist()
    zeros = [[zero - offset for zero in stream(column, bits, outputs)] for column in columns if column]
    weight = np.zeros((outputs, inputs))
    for n in range(outputs):
        for k, code in enumerate(stream(tensors["weight_packed"][n].tolist(), bits, inputs)):
            group = k // group_size
            weight[n, k] = scales[n, group] * (code - offset - (zeros[group][n] if zeros else 0))
    return weight


def layer_tensors(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {
        name.removeprefix(f"{Q_PROJ}."): each for name, each in tensors.items() if name.startswith(Q_PROJ)
    }


def q_proj(lm: LanguageModel) -> np.ndarray:
    return lm.model.get_submodule(Q_PROJ).weight.detach().double().numpy()


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym", "int8", "int3-g64", "int2-g32-asym"])
def test_gptq_files_say_what_the_model_holds(scheme: str, tmp_path: Path) -> None:
    lm = quantized(scheme)
    write_checkpoint(lm, tmp_path, "gptq")
    wanted = q_proj(in_float16(lm))
    decoded = gptq_weight(
        layer_tensors(tmp_path), Scheme.parse(scheme).weights.bits, 0 if "asym" in scheme else 1
    )
    np.testing.assert_allclose(decoded, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("scheme", "size"), [("int4-g32-asym", 32), ("int4-g64", 64), ("int4", 64)])
def test_awq_files_say_what_the_model_holds(scheme: str, size: int, tmp_path: Path) -> None:
    lm = quantized(scheme)
    write_checkpoint(lm, tmp_path, "awq")
    np.testing.assert_allclose(
        awq_weight(layer_tensors(tmp_path), size), q_proj(in_float16(lm)), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize(
    ("scheme", "bits", "size"), [("int4-g32-asym", 4, 32), ("int4-g64", 4, 64), ("int8", 8, 64)]
)
def test_packed_files_say_what_the_model_holds_exactly(
    scheme: str, bits: int, size: int, tmp_path: Path
) -> None:
    lm = quantized(scheme)
    write_checkpoint(lm, tmp_path, "compressed-tensors")
    np.testing.assert_allclose(packed_weight(layer_tensors(tmp_path), bits, size), q_proj(lm), rtol=1e-7)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 3), st.data())
def test_words_hold_codes_least_significant_bits_first(bits: int, rows: int, blocks: int, data) -> None:
    count = 32 * blocks
    line = st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)
    codes = data.draw(st.lists(line, min_size=rows, max_size=rows))
    words = to_words(torch.tensor(codes), bits)
    assert words.shape == (rows, count * bits // 32)
    assert [stream(row, bits, count) for row in words.tolist()] == codes
    assert from_words(words, bits, count).tolist() == codes


# ---------------------------------------------------------------- write and read back


@pytest.mark.parametrize(("form", "scheme"), SCHEMES)
def test_what_is_written_is_read_back(form: str, scheme: str, tmp_path: Path) -> None:
    lm = quantized(scheme)
    size = write_checkpoint(lm, tmp_path / "out", form)
    back = load(str(tmp_path / "out"), dtype="fp32")
    exact = lm if form == "compressed-tensors" else in_float16(lm)
    torch.testing.assert_close(logits(back), logits(exact), rtol=0, atol=2e-5)
    said = scheme if form != "awq" or "asym" in scheme else scheme + "-asym"  # AWQ cannot say symmetric
    assert set(back.precision.split("+")) == set(said.split("+"))
    assert back.sha256
    assert size == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    for name, part in lm.model.named_modules():
        if isinstance(part, QuantLinear):
            other = back.model.get_submodule(name)
            assert other.packed.unpacked().numel() == part.packed.unpacked().numel()
            assert not other.packed.caches


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_dtype_is_of_what_is_not_quantized(form: str, tmp_path: Path) -> None:
    lm = read_checkpoint(written(tmp_path, form), dtype="bf16")
    layer = lm.model.get_submodule(Q_PROJ)
    assert lm.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16
    assert layer.packed.scale.dtype == torch.float32
    assert logits(lm).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["gptq", "autogptq", "awq", "compressed-tensors"])
def test_tied_embedding_stays_tied(form: str, tied: bool, tmp_path: Path) -> None:
    lm = quantized("int4-g32", tied=tied)
    write_checkpoint(lm, tmp_path, form)
    held = "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert held == (not tied or form == "autogptq")
    back = read_checkpoint(tmp_path, dtype="fp32")
    embedding, head = back.model.get_input_embeddings(), back.model.get_output_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert torch.equal(head.weight, lm.model.get_output_embeddings().weight)


def test_folder_has_all_that_transformers_reads(tmp_path: Path) -> None:
    lm = quantized("int4-g32")
    lm.model.generation_config.max_new_tokens = 7
    lm.model.config.rope_parameters["rope_theta"] = 5e5
    lm.model.model.rotary_emb = type(lm.model.model.rotary_emb)(lm.model.config)
    write_checkpoint(lm, tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["rope_theta"] == 5e5  # where transformers 4 looks for it
    assert config["quantization_config"]["group_size"] == 32
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == config["quantization_config"]
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 5e5
    back = read_checkpoint(tmp_path, dtype="fp32")
    assert back.model.generation_config.max_new_tokens == 7
    assert not hasattr(back.model.config, "quantization_config")
    assert back.tokens("5 and 6") == lm.tokens("5 and 6")
    torch.testing.assert_close(logits(back), logits(in_float16(lm)), rtol=0, atol=2e-5)


def test_what_is_read_can_be_saved_as_an_artifact(tmp_path: Path) -> None:
    scheme = "int4-g32+layers.*.mlp.down_proj=int8+layers.0.self_attn.q_proj=fp32"
    lm = read_checkpoint(written(tmp_path / "out", "compressed-tensors", scheme), dtype="fp32")
    save_artifact(lm, tmp_path / "artifact", dtype="fp32")
    assert torch.equal(logits(load(str(tmp_path / "artifact"))), logits(lm))


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    wanted = logits(read_checkpoint(written(tmp_path), dtype="fp32"))
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, some in files.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(read_checkpoint(tmp_path, dtype="fp32")), wanted)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-2\.safetensors is damaged or missing"):
        read_checkpoint(tmp_path)


# ---------------------------------------------------------------- GPTQ as others write it


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 4, 8]), st.sampled_from([16, 32]), st.integers(0, 2**32 - 1), st.booleans())
def test_gptq_with_any_group_index_and_wrapping_zero_points(
    tmp_path_factory: pytest.TempPathFactory, bits: int, size: int, seed: int, v1: bool
) -> None:
    """Act-order, and v1 zero points of 0, which GPTQModel subtracts from whole words."""
    draw = np.random.default_rng(seed)
    inputs, outputs = 64, 32
    codes = draw.integers(0, 2**bits, (outputs, inputs))
    zeros = draw.integers(0, 2**bits, (outputs, inputs // size))
    scales = torch.tensor(draw.uniform(0.01, 1.0, (inputs // size, outputs))).half()
    g_idx = draw.permutation(np.arange(inputs) // size)

    def words(rows: np.ndarray) -> np.ndarray:  # [n, lines] -> [n * bits / 32, lines], by hand
        per = 32 // bits
        shifted = rows.reshape(-1, per, rows.shape[1]) << (bits * np.arange(per))[None, :, None]
        return shifted.sum(axis=1)

    ones = sum(1 << shift for shift in range(0, 32, bits))
    qzeros = words(zeros).T - (ones if v1 else 0)
    folder = tmp_path_factory.mktemp("gptq")
    tensors = {"qweight": torch.from_numpy(words(codes.T)), "qzeros": torch.from_numpy(qzeros)}
    tensors = {name: each.to(torch.int32) for name, each in tensors.items()}
    tensors |= {"scales": scales, "g_idx": torch.from_numpy(g_idx.astype(np.int32))}
    save_file({f"x.{name}": each.contiguous() for name, each in tensors.items()}, folder / "x.safetensors")
    config = {
        "bits": bits,
        "group_size": size,
        "sym": False,
        "checkpoint_format": "gptq" if v1 else "gptq_v2",
    }

    stored = GPTQ().from_tensors(config, LayerTensors(Shards(folder), "x"), outputs, inputs)
    layer = stored.layer(nn.Linear(inputs, outputs))
    weight = scales.double().numpy()[g_idx].T * (codes - zeros[:, g_idx])
    np.testing.assert_allclose(layer.weight.double().numpy(), weight, rtol=1e-6)
    x = torch.from_numpy(draw.standard_normal((3, inputs))).float()
    np.testing.assert_allclose(layer(x).numpy(), x.numpy() @ weight.T, rtol=1e-3, atol=1e-3 * 2**bits)
    # Written again as v2, every tensor is as it would have been.
    again = GPTQ().to_tensors(AffineLinear.of(layer, "x"), "x")
    assert torch.equal(again["qweight"], tensors["qweight"])
    assert torch.equal(again["g_idx"], tensors["g_idx"])
    assert torch.equal(again["scales"], scales)
    assert again["qzeros"].tolist() == torch.from_numpy(words(zeros).T).to(torch.int32).tolist()


def test_act_order_survives_writing(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)

    def permute(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("g_idx")]:
            order = torch.randperm(len(tensors[name]), generator=draw)
            tensors[name] = tensors[name][order]

    edit(written(tmp_path / "a"), permute)
    lm = read_checkpoint(tmp_path / "a", dtype="fp32")
    write_checkpoint(lm, tmp_path / "b", "gptq")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "b" / "quantize_config.json").read_text())["desc_act"] is True
    weight = lm.model.get_submodule(Q_PROJ).weight.double().numpy()
    np.testing.assert_allclose(weight, gptq_weight(layer_tensors(tmp_path / "a"), 4, 1), rtol=1e-6)
    with pytest.raises(InputError, match="desc_act"):
        write_checkpoint(lm, tmp_path / "c", "awq")
    with pytest.raises(InputError, match="act-order"):
        write_checkpoint(lm, tmp_path / "c", "compressed-tensors")


def test_compressed_tensors_with_a_group_index(tmp_path: Path) -> None:
    folder = written(tmp_path, "compressed-tensors", "int4-g32-asym")
    g_idx = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    edit(folder, lambda tensors: tensors.update({f"{Q_PROJ}.weight_g_idx": g_idx.int()}))
    tensors = layer_tensors(folder)
    codes = torch.tensor([stream(row, 4, 64) for row in tensors["weight_packed"].tolist()])
    zeros = torch.tensor([stream(row, 4, 64) for row in tensors["weight_zero_point"].t().tolist()]).t()
    wanted = tensors["weight_scale"][:, g_idx] * (codes - zeros[:, g_idx])
    lm = read_checkpoint(folder, dtype="fp32")
    torch.testing.assert_close(lm.model.get_submodule(Q_PROJ).weight, wanted, rtol=1e-6, atol=1e-8)


def test_zero_biases_of_old_autogptq_are_dropped(tmp_path: Path) -> None:
    folder = written(tmp_path)
    wanted = logits(read_checkpoint(folder, dtype="fp32"))
    name = "model.layers.0.mlp.down_proj"
    edit(folder, lambda tensors: tensors.update({f"{name}.bias": torch.zeros(64, dtype=torch.float16)}))
    lm = read_checkpoint(folder, dtype="fp32")
    assert lm.model.get_submodule(name).bias is None
    assert torch.equal(logits(lm), wanted)


def test_settings_of_old_autogptq_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    folder = written(tmp_path)
    document = json.loads((folder / "config.json").read_text())
    settings = document.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(document))
    old = {key: settings[key] for key in ("bits", "group_size", "sym", "desc_act")}
    (folder / "quantize_config.json").write_text(json.dumps(old))
    assert read_checkpoint(folder).precision == "int4-g32"
    (folder / "quantize_config.json").unlink()
    with pytest.raises(InputError, match="has no quantization_config"):
        read_checkpoint(folder)


# ---------------------------------------------------------------- what cannot be written


@pytest.mark.parametrize(
    ("form", "scheme", "message"),
    [
        ("gptq", "nf4", r"self_attn.q_proj holds nf4; .* quantize to int4-g128"),
        ("gptq", "int5-g32", "hold 2, 3, 4 or 8 bits, not the 5 of int5-g32"),
        ("gptq", "int4-g24", "has 64 inputs, which are no whole groups of 24"),
        ("gptq", "w8a8-dynamic", "export to compressed-tensors"),
        ("gptq", "int4-g32+layers.1.*=int8", "layers.1.self_attn.q_proj int8: export to compressed-tensors"),
        ("gptq", "int4-g32+layers.1.mlp.up_proj=fp32", r"layers.1.mlp.up_proj is a float"),
        ("gptq", "int4-g32+embedding=int8", "embed_tokens is quantized to int8; .* without '"),
        ("autogptq", "int4-g32-asym", "without '-asym', or export to gptq"),
        ("awq", "int8", "hold 4 bits, not the 8 of int8"),
        ("awq", "nf4", "q_proj holds nf4|hold"),
        ("compressed-tensors", "int3-g32", "packs 2, 4 or 8 bits, not the 3"),
        ("compressed-tensors", "w4a8-g32", "w8a8 or w8a8-dynamic, not w4a8-g32"),
        ("compressed-tensors", "fp8_e4m3", "holds fp8_e4m3"),
        ("ggml", "int4-g32", "unknown checkpoint format 'ggml'.*gptq, autogptq, awq, compressed-tensors"),
    ],
)
def test_what_a_format_cannot_hold_is_named(form: str, scheme: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_checkpoint(quantized(scheme), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_layers_left_as_floats_are_kept_by_awq(tmp_path: Path) -> None:
    lm = quantized("int4-g32-asym+layers.1.mlp.up_proj=fp32")
    write_checkpoint(lm, tmp_path, "awq")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.layers.1.mlp.up_proj"]
    assert read_checkpoint(tmp_path, dtype="fp32").precision == lm.precision


def test_explicit_input_scales_have_no_place(tmp_path: Path) -> None:
    lm = quantized("int4-g32", "awq")
    assert any(getattr(part, "input_scale", None) is not None for part in lm.model.modules())
    with pytest.raises(InputError, match=r"o_proj scales its inputs .* gptq, clip, hqq or rtn"):
        write_checkpoint(lm, tmp_path, "awq")


def test_outliers_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without the method 'outlier'"):
        write_checkpoint(quantized("int4-g32", "outlier"), tmp_path, "gptq")


def test_scales_beyond_float16_are_named(tmp_path: Path) -> None:
    lm = quantized("int4-g32")
    lm.model.get_submodule(Q_PROJ).packed.scale[3, 1] = 1e-9
    with pytest.raises(InputError, match=r"q_proj: scales from 1e-09 .* compressed-tensors keeps them"):
        write_checkpoint(lm, tmp_path, "gptq")
    write_checkpoint(lm, tmp_path, "compressed-tensors")
    assert read_checkpoint(tmp_path).model.get_submodule(Q_PROJ).packed.scale[3, 1] == np.float32(1e-9)


def test_float_models_are_not_exported(tmp_path: Path) -> None:
    lm = LanguageModel(copy.deepcopy(tiny.model()), tiny.tokenizer(), "tiny", "fp32")
    with pytest.raises(InputError, match="nothing in the model is quantized"):
        write_checkpoint(lm, tmp_path, "gptq")


def test_unfinished_folder_has_no_config(tmp_path: Path) -> None:
    folder = written(tmp_path / "out")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    (folder / "model.safetensors" / "x").touch()
    with pytest.raises(InputError, match="cannot be written to"):
        written(folder)
    assert not (folder / "config.json").exists()
    assert not list(folder.glob("*.tmp"))


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written to"):
        written(tmp_path / "file")


# ---------------------------------------------------------------- what is damaged


def drop(name: str):
    return lambda tensors: tensors.pop(f"{Q_PROJ}.{name}")


def put(name: str, value: Tensor):
    return lambda tensors: tensors.update({f"{Q_PROJ}.{name}": value})


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gptq", drop("qzeros"), r"the tensor \S+q_proj.qzeros is missing"),
        ("gptq", drop("bias"), r"the tensor \S+q_proj.bias is missing"),
        ("gptq", drop("qweight"), r"holds \S+q_proj\.\w+, which its config.json has no place for"),
        (
            "gptq",
            put("qweight", torch.zeros(4, 64, dtype=torch.int32)),
            r"qweight .* \[4, 64\], not int32 \[8, 64\]",
        ),
        ("gptq", put("qweight", torch.zeros(8, 64)), "float32 .* not int32"),
        ("gptq", put("scales", torch.full((2, 64), torch.nan).half()), "scales is damaged: it holds NaN"),
        ("gptq", put("qzeros", torch.zeros(2, 8, dtype=torch.int32)), "qzeros is damaged: .* not all 8"),
        ("gptq", put("g_idx", torch.zeros(64, dtype=torch.int32)), "g_idx is damaged"),
        (
            "gptq",
            lambda tensors: tensors.pop("model.norm.weight"),
            r"the tensor model\.norm\.weight is missing",
        ),
        ("gptq", lambda tensors: tensors.update({"extra": torch.ones(1)}), "holds extra, which"),
        ("awq", drop("scales"), r"q_proj\.scales is missing"),
        (
            "awq",
            put("qzeros", torch.zeros(1, 8, dtype=torch.int32)),
            r"qzeros .* \[1, 8\], not int32 \[2, 8\]",
        ),
        ("compressed-tensors", drop("weight_shape"), r"weight_shape is missing"),
        (
            "compressed-tensors",
            put("weight_shape", torch.tensor([64, 32])),
            r"says \[64, 32\], but .* \[64, 64\]",
        ),
        ("compressed-tensors", put("weight_scale", torch.ones(64, 1)), r"\[64, 1\], not float \[64, 2\]"),
    ],
)
def test_damaged_tensors_are_named(form: str, change, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path, form)
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gptq", {"bits": 5}, "5 bits in the form 'gptq' is not read"),
        ("gptq", {"bits": 8}, r"qweight does not fit .* not int32 \[16, 64\]"),
        ("gptq", {"bits": "four"}, "bits = 'four'; it should be int"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not read"),
        ("gptq", {"quant_method": "quip"}, "unknown checkpoint format 'quip'"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"bits": 8}, "of 8 bits"),
        ("awq", {"zero_point": False}, "without zero points"),
        ("compressed-tensors", {"config_groups": None}, "config_groups = None"),
        ("compressed-tensors", {"config_groups": {}}, "no group of quantization_config names it"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ],
)
def test_unreadable_settings_are_named(form: str, changes: dict, message: str, tmp_path: Path) -> None:
    folder = written(tmp_path, form)
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=message):
        read_checkpoint(folder)


def weights(**changes) -> dict:
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"group_0": {"targets": ["re:.*_proj"], "weights": {**base, **changes}}}


def test_groups_name_layers_by_patterns(tmp_path: Path) -> None:
    folder = written(tmp_path, "compressed-tensors")
    edit_config(folder, config_groups=weights())
    assert read_checkpoint(folder).precision == "int4-g32"
    for changes in ({"type": "float"}, {"num_bits": 6}, {"strategy": "block"}, {"dynamic": True}):
        edit_config(folder, config_groups=weights(**changes))
        with pytest.raises(InputError, match=r"q_proj has .* weights"):
            read_checkpoint(folder)


@pytest.mark.parametrize(
    "change", [{"symmetric": True}, {"num_bits": 4}, {"type": "float"}, {"strategy": "group"}]
)
def test_activations_that_are_not_computed_are_refused(change: dict, tmp_path: Path) -> None:
    folder = written(tmp_path, "compressed-tensors", "w8a8-dynamic")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= change
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="quantizes its inputs dynamically"):
        read_checkpoint(folder)


def test_static_symmetric_activations_have_their_zero_in_the_middle(tmp_path: Path) -> None:
    folder = written(tmp_path, "compressed-tensors", "w8a8")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = True
    (folder / "config.json").write_text(json.dumps(document))
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "input_zero_point" in name])
    layer = read_checkpoint(folder).model.get_submodule(Q_PROJ)
    assert layer.activation_quantizers()["input_quant"].zero_point == 128


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        read_checkpoint(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle, which is not read"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="no index of tensors"):
        read_checkpoint(folder)


def test_quantized_output_layer_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    edit(folder, lambda tensors: tensors.update({"lm_head.qweight": torch.zeros(8, 260, dtype=torch.int32)}))
    with pytest.raises(InputError, match=r"lm_head .* is quantized"):
        read_checkpoint(folder)


def test_int_scheme_names() -> None:
    assert int_scheme(4, 128, symmetric=False).name == "int4-g128-asym"
    assert int_scheme(8, None, symmetric=True).name == "int8"


# ---------------------------------------------------------------- the command, and the other libraries


def test_command_exports_an_artifact(tmp_path: Path) -> None:
    lm = quantized("int4-g32")
    save_artifact(lm, tmp_path / "artifact", dtype="fp32")
    arguments = [
        "export",
        str(tmp_path / "artifact"),
        "--to",
        "compressed-tensors",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "int4-g32, a checkpoint for compressed-tensors" in done.output
    assert torch.equal(logits(load(str(tmp_path / "out"), dtype="fp32")), logits(lm))
    arguments[3] = "onnx"
    with pytest.raises(InputError, match=r"unknown export target for a language model 'onnx'.*awq"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def peer(variable: str, work: Path, *arguments: object) -> None:
    """Run the peer script in another Python, or skip; it may leave files in the folder ``work``."""
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python that has the library")
    command = [python, str(PEER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work)
    assert done.returncode == 0, done.stderr[-2000:]


def peer_logits(variable: str, reader: str, folder: Path, work: Path) -> Tensor:
    np.save(work / "ids.npy", tokens()[0].numpy())
    peer(variable, work, "read", reader, folder, "fp32", work / "ids.npy", work / "logits.npy")
    return torch.from_numpy(np.load(work / "logits.npy"))[None]


def in_half(lm: LanguageModel) -> LanguageModel:
    """With dense weights and biases rounded to float16, as GPTQModel's kernels have them."""
    for name, part in list(lm.model.named_modules()):
        if isinstance(part, QuantLinear):
            dense = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
            dense.weight = nn.Parameter(part.weight.half().float())
            if part.bias is not None:
                dense.bias = nn.Parameter(part.bias.half().float())
            lm.model.set_submodule(name, dense)
    return lm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "scheme", "reader", "variable"),
    [
        ("gptq", "int4-g32", "transformers", "RLQUANT_TEST_GPTQMODEL_PYTHON"),
        ("gptq", "int4-g32-asym", "transformers", "RLQUANT_TEST_GPTQMODEL_PYTHON"),
        ("awq", "int4-g32-asym", "transformers", "RLQUANT_TEST_GPTQMODEL_PYTHON"),
        ("compressed-tensors", "int4-g32", "transformers", "RLQUANT_TEST_GPTQMODEL_PYTHON"),
        ("compressed-tensors", "w8a8", "transformers", "RLQUANT_TEST_GPTQMODEL_PYTHON"),
        ("autogptq", "int4-g32", "autogptq", "RLQUANT_TEST_AUTOGPTQ_PYTHON"),
    ],
)
def test_other_libraries_read_what_is_written(
    form: str, scheme: str, reader: str, variable: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "out", form, scheme)
    theirs = peer_logits(variable, reader, folder, tmp_path)
    here = read_checkpoint(folder, dtype="fp32")
    if form in ("gptq", "awq"):
        here = in_half(here)
    torch.testing.assert_close(theirs, logits(here), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"desc_act": True}, {"sym": False, "format": "gptq_v2"}])
def test_what_gptqmodel_writes_is_read(extra: dict, tmp_path: Path) -> None:
    variable = "RLQUANT_TEST_GPTQMODEL_PYTHON"
    source = tiny.saved(tmp_path / "float")
    (tmp_path / "texts.json").write_text(json.dumps([tiny.TEXT[k * 300 : k * 300 + 300] for k in range(24)]))
    made = json.dumps({"bits": 4, "group_size": 32, **extra})
    peer(variable, tmp_path, "make", source, tmp_path / "made", made, tmp_path / "texts.json")
    theirs = peer_logits(variable, "transformers", tmp_path / "made", tmp_path)
    here = read_checkpoint(tmp_path / "made", dtype="fp32")
    torch.testing.assert_close(theirs, logits(in_half(here)), rtol=0, atol=1e-4)


def test_quantized_embedding_stays_out_of_the_way() -> None:
    """The check that refuses it looks for the class that quantize_model_ makes."""
    assert isinstance(quantized("int4-g32+embedding=int8").model.get_input_embeddings(), QuantEmbedding)
