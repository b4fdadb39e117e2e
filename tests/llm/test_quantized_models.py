"""Block by block: what it gives, what it keeps when it is killed, what comes back from disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlquant.errors import InputError
from rlquant.llm.artifact import load_artifact, save_artifact
from rlquant.llm.calibration import windows_of
from rlquant.llm.load import load
from rlquant.llm.model import LanguageModel
from rlquant.llm.quantize import Plan, quantize_model_
from rlquant.llm.text import Windows, compare_windows
from rlquant.quant import QuantEmbedding, QuantLinear, quantize_, weight_bytes
from rlquant.runs import RunFolder


def fresh(*, tied: bool = True) -> LanguageModel:
    return LanguageModel(copy.deepcopy(tiny.model(tied=tied)), tiny.tokenizer(), "tiny", "fp32")


def windows(count: int = 12) -> Windows:
    return Windows.of(fresh().tokens(tiny.TEXT), 48, limit=count)


def calibration() -> torch.Tensor:
    return windows_of([fresh().tokens(tiny.TEXT)[20_000:]], windows=10, length=48, seed=0)


def test_rounding_block_by_block_is_rounding_the_whole() -> None:
    lm = quantize_model_(fresh(), Plan.parse("int4-g32"))
    whole = fresh().model
    quantize_(whole.model.layers, "int4-g32")
    ids = torch.from_numpy(windows(2).tokens)
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, whole(ids).logits)


def salient() -> LanguageModel:
    """The same function with a few large channels, as large models have them: in the norms, not in the weights."""
    lm = fresh()
    for block in lm.model.model.layers:
        for norm, readers in (
            (block.input_layernorm, [getattr(block.self_attn, f"{name}_proj") for name in "qkv"]),
            (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
        ):
            norm.weight.data[:3] *= 16
            for reader in readers:
                reader.weight.data[:, :3] /= 16
    return lm


def test_calibrated_methods_come_nearer_than_rounding() -> None:
    text, read, far = windows(), calibration(), {}
    for method in ("rtn", "gptq", "awq"):
        lm = quantize_model_(salient(), Plan.parse("int3-g32", method), calibration=read)
        far[method] = compare_windows(fresh(), lm, text).kl
    assert far["gptq"] < 0.7 * far["rtn"]
    assert far["awq"] < 0.7 * far["rtn"]


@pytest.mark.parametrize(
    ("name", "method"), [("w8a8", "smoothquant"), ("w8a8-dynamic", "rtn"), ("int8", "outlier")]
)
def test_eight_bits_are_near(name: str, method: str) -> None:
    lm = quantize_model_(fresh(), Plan.parse(name, method), calibration=calibration())
    found = compare_windows(fresh(), lm, windows())
    assert found.kl < 0.01
    assert found.top1 > 0.95


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(tied: bool) -> None:
    lm = quantize_model_(fresh(tied=tied), Plan.parse("nf4+embedding=int8"))
    embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert (embedding.packed is head.packed) == tied
    assert lm.parameters == fresh(tied=tied).parameters
    assert compare_windows(fresh(tied=tied), lm, windows()).top1 > 0.9


def test_single_layers_have_schemes_of_their_own() -> None:
    lm = quantize_model_(fresh(), Plan.parse("int4-g32+layers.0.*=int8+layers.*.mlp.down_proj=bf16"))
    blocks = lm.model.model.layers
    assert blocks[0].self_attn.q_proj.scheme.name == "int8"
    assert blocks[1].self_attn.q_proj.scheme.name == "int4-g32"
    assert {block.mlp.down_proj.scheme.name for block in blocks} == {"bf16"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["nf4-dq+embedding=int8", "int4-g32-asym", "w8a8"])
def test_an_artifact_computes_what_was_saved(name: str, tied: bool, tmp_path: Path) -> None:
    lm = quantize_model_(fresh(tied=tied), Plan.parse(name), calibration=calibration())
    size = save_artifact(lm, tmp_path, dtype="fp32")
    again = load(str(tmp_path))
    assert size > weight_bytes(lm.model)
    assert size < weight_bytes(lm.model) + 60_000  # the tokenizer, mostly
    assert again.precision == lm.precision
    assert weight_bytes(again.model) == weight_bytes(lm.model)
    ids = torch.from_numpy(windows(2).tokens)
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, lm.model(ids).logits)
        made = [each.model.generate(ids[:1, :9], max_new_tokens=12, do_sample=False) for each in (lm, again)]
    assert torch.equal(*made)


class Killed(Exception):
    pass


def test_an_interrupted_run_goes_on_after_the_last_finished_block(tmp_path: Path) -> None:
    plan, read = Plan.parse("int3-g32", "gptq"), calibration()

    def stop(done: int, wanted: int) -> None:
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        quantize_model_(
            fresh(), plan, calibration=read, store=RunFolder(tmp_path, {"of": "this"}), progress=stop
        )
    finished = (tmp_path / "pieces" / "block-0.safetensors").stat().st_mtime_ns
    resumed = quantize_model_(fresh(), plan, calibration=read, store=RunFolder(tmp_path, {"of": "this"}))
    assert (tmp_path / "pieces" / "block-0.safetensors").stat().st_mtime_ns == finished
    straight = quantize_model_(fresh(), plan, calibration=read)
    for key, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key
    other = RunFolder(tmp_path, {"of": "another"})
    assert other.tensors("block-0") is None


def damage(folder: Path, change: Any) -> None:
    document = json.loads((folder / "rlquant.json").read_text())
    change(document)
    (folder / "rlquant.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="rlquant.lm/2"), "schema 'rlquant.lm/2'"),
        (lambda d: d.update(sha256="0"), "does not match its hash"),
        (lambda d: d.update(precision="int4-g16"), "is damaged"),
        (lambda d: d.pop("method"), "method is None"),
        (lambda d: d.update(precision="nonsense"), "nonsense"),
    ],
)
def test_damaged_artifacts_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    save_artifact(quantize_model_(fresh(), Plan.parse("int4-g32")), tmp_path, dtype="fp32")
    damage(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_artifact(tmp_path)


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        save_artifact(quantize_model_(fresh(), Plan.parse("int8")), tmp_path / "file", dtype="fp32")


def test_how_it_generates_is_kept(tmp_path: Path) -> None:
    lm = quantize_model_(fresh(), Plan.parse("int8"))
    lm.model.generation_config.max_new_tokens = 7
    save_artifact(lm, tmp_path, dtype="fp32")
    assert load(str(tmp_path)).model.generation_config.max_new_tokens == 7


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    save_artifact(quantize_model_(fresh(), Plan.parse("int8")), tmp_path, dtype="fp32")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="does not match its hash"):
        load_artifact(tmp_path)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("int4-g32", "gptq", "needs calibration"),
        ("int5-g32+layers.9.*=int8", "rtn", "layers.9"),
        ("int4+attention=int8", "rtn", "'attention' names no layer"),
        ("int4+embedding", "rtn", "names no scheme"),
        ("int4", "gptqq", "gptqq"),
        ("w8a8+embedding=w8a8", "rtn", "calibration|embedding"),
    ],
)
def test_plans_that_cannot_be(name: str, method: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize_model_(fresh(), Plan.parse(name, method))


def test_weights_that_are_no_numbers_are_named() -> None:
    lm = fresh()
    lm.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"block 1: .*up_proj.*NaN"):
        quantize_model_(lm, Plan.parse("int8"))


def test_no_dense_weight_is_kept() -> None:
    lm = quantize_model_(fresh(), Plan.parse("nf4+embedding=nf4"))
    with torch.no_grad():
        lm.model(torch.from_numpy(windows(1).tokens))
    held = {id(t): t.numel() * t.element_size() for t in _tensors_of(lm.model)}
    assert sum(held.values()) <= 1.02 * weight_bytes(lm.model) + 4096


def _tensors_of(model: Any) -> list[torch.Tensor]:
    found = []
    for part in model.modules():
        found += [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        found += [
            value for value in (*part._parameters.values(), *part._buffers.values()) if value is not None
        ]
    return found
