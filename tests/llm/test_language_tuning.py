"""The search for the smallest plan that keeps a language model's lead."""

from __future__ import annotations

import copy
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Qwen2ForCausalLM

from rlquant.errors import InputError
from rlquant.llm.calibration import calibration_apart, windows_of
from rlquant.llm.load import load
from rlquant.llm.model import LanguageModel
from rlquant.llm.parts import BITS, STEPS, TABLE_STEPS, parts_of, plan_of
from rlquant.llm.quantize import Plan, prepare_
from rlquant.llm.sensitivity import PartSensitivity, language_sensitivities
from rlquant.llm.text import Windows, window_losses
from rlquant.llm.tune import language_ladder, split_windows
from rlquant.llm.versions import at_precision
from rlquant.measure import short_name, validate_results
from rlquant.quant import quantize_, weight_bytes
from rlquant.runs import RunFolder

Run = Callable[..., Any]

SPIKY = "layers.1.mlp.down_proj"
# A short search: 64-token windows, 24 of them to search with and 40 to prove with.
SHORT = ("--window", 64, "--search-windows", 24, "--windows", 40)
SHORT += ("--calibration-windows", 24, "--calibration-length", 64)


def spiky() -> LanguageModel:
    """A trained model, one layer of which is hard to quantize: the same function with three large input channels.

    Their factors are taken out of ``up_proj``, whose rows have scales of their own and do not notice.
    """
    model = copy.deepcopy(tiny.model(steps=400))
    mlp = model.model.layers[1].mlp
    mlp.down_proj.weight.data[:, :3] *= 64
    mlp.up_proj.weight.data[:3] /= 64
    return LanguageModel(model, tiny.tokenizer(), "tiny", "fp32")


def read(lm: LanguageModel) -> tuple[Windows, torch.Tensor]:
    """Windows of text, and calibration from elsewhere in it."""
    ids = lm.tokens(tiny.TEXT)
    calibration = windows_of([ids[40_000:]], windows=24, length=64, seed=0)
    return Windows.of(ids[:40_000], 64, limit=24), calibration


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[PartSensitivity]:
    lm = spiky()
    windows, calibration = read(lm)
    folder = RunFolder(tmp_path_factory.mktemp("run"), {})
    return language_sensitivities(lm, windows, calibration, folder=folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spiky")
    lm = spiky()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT)
    return path


def kl(reference: Any, candidate: Any, ids: torch.Tensor) -> float:
    """By stock torch, on the logits of stock forwards."""
    with torch.no_grad():
        p, q = (F.log_softmax(each(ids).logits.double(), -1).flatten(0, 1) for each in (reference, candidate))
    return float(F.kl_div(q, p, reduction="batchmean", log_target=True))


def test_sensitivity_is_the_divergence_with_one_part_alone_quantized(found: list[PartSensitivity]) -> None:
    by_part = {(each.layer, each.bits): each for each in found}
    assert len(by_part) == len(found) == 4 + 2 * 3 * len(BITS)
    lm = spiky()
    windows, calibration = read(lm)
    ids = torch.from_numpy(windows.tokens[:8])  # 512 tokens
    own = {
        "layers.0.self_attn": "model.layers.0.self_attn.*",
        SPIKY: f"model.{SPIKY}",
        "layers.1.mlp": "model.layers.1.mlp.[gu]*",
    }
    for part, pattern in own.items():
        # The whole model at once, not block by block, and no other layer touched.
        whole = copy.deepcopy(lm.model)
        quantize_(
            whole,
            "fp32",
            method="gptq",
            calibration=[calibration],
            schemes={pattern: STEPS[3]},
            sequential=False,
        )
        assert by_part[part, 3].divergence == pytest.approx(kl(lm.model, whole, ids), rel=0.02), part
    table = at_precision(lm, f"fp32+embedding={TABLE_STEPS[4]}").model
    expected = kl(lm.model, table, ids)
    assert by_part["embedding", 4].divergence == pytest.approx(expected, rel=0.02)
    assert all(each.divergence >= 0 for each in found)
    assert by_part[SPIKY, 4].divergence > 5 * by_part["layers.0.mlp.down_proj", 4].divergence


def test_measuring_changes_nothing(found: list[PartSensitivity], tmp_path: Path) -> None:
    lm = spiky()
    before = copy.deepcopy(lm.model.state_dict())
    folder = RunFolder(tmp_path, {})
    again = language_sensitivities(lm, *read(lm), folder=folder)
    assert again == found
    assert all(torch.equal(tensor, lm.model.state_dict()[name]) for name, tensor in before.items())
    kept = folder.piece("sensitivity-layers-1-int4")
    assert kept is not None
    kept["parts"][0]["divergence"] = 7.0
    folder.save_piece("sensitivity-layers-1-int4", kept)
    resumed = language_sensitivities(lm, *read(lm), folder=folder)
    assert [each.divergence for each in resumed].count(7.0) == 1  # a finished block is not measured again


def test_a_sensitive_layer_keeps_more_bits_all_the_way_down(found: list[PartSensitivity]) -> None:
    lm = spiky()
    names = list(language_ladder(lm, found))
    assert names[0] == "int8+embedding=int8"
    assert names[-1] == f"{STEPS[2]}+embedding={TABLE_STEPS[3]}"
    assert len(names) == 1 + 3 + 6 * (len(BITS) - 1)
    mean = {0: 0.0, 1: 0.0}
    for name in names:
        for block in mean:
            schemes = _schemes(Plan.parse(name))
            mean[block] += schemes[f"layers.{block}.mlp.down_proj"].weights.bits / len(names)
    assert mean[1] > mean[0] + 0.5


def _schemes(plan: Plan) -> dict[str, Any]:
    """The scheme of every linear layer, as the quantized model itself says."""
    with torch.device("meta"):
        made = Qwen2ForCausalLM(tiny.config())
    prepare_(made, plan)
    return {
        name.removeprefix("model."): layer.scheme
        for name, layer in made.named_modules()
        if name.startswith("model.layers.") and hasattr(layer, "scheme") and "packed" not in name
    }


def test_bytes_of_a_rung_are_those_of_the_model(found: list[PartSensitivity]) -> None:
    lm = spiky()
    sizes = language_ladder(lm, found)
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for name in list(sizes)[::4]:
        assert weight_bytes(at_precision(lm, name).model) == sizes[name]


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_plan_gives_every_part_what_was_chosen(data: st.DataObject) -> None:
    parts = parts_of(tiny.model())
    assert [part.name for part in parts[:3]] == [
        "layers.0.self_attn",
        "layers.0.mlp",
        "layers.0.mlp.down_proj",
    ]
    chosen = {part: data.draw(st.sampled_from(list(STEPS.values()))) for part in parts}
    plan = plan_of(chosen, "int8", "gptq")
    assert Plan.parse(plan.name, "gptq") == plan
    schemes = {name: scheme.name for name, scheme in _schemes(plan).items()}
    assert schemes == {
        f"layers.{part.block}.{name}": scheme for part, scheme in chosen.items() for name in part.names
    }


def test_search_proof_and_calibration_share_no_token() -> None:
    ids = list(range(10_000))  # each token once, so that a token tells its place
    rest, calibration, _ = calibration_apart(spiky(), ids, None, windows=12, length=40, seed=0)
    search, proof = split_windows(Windows.of(rest, 50), search=30, proof=100, seed=3)
    seen = [set(part.ravel().tolist()) for part in (search.tokens, proof.tokens, calibration.numpy())]
    assert [len(each) for each in seen] == [30 * 50, 100 * 50, 12 * 40]
    assert len(set.union(*seen)) == sum(map(len, seen))
    assert not np.array_equal(search.tokens, split_windows(Windows.of(rest, 50), search=30, seed=4)[0].tokens)
    with pytest.raises(InputError, match="must not overlap"):
        split_windows(Windows.of(rest, 50, 25), search=30)
    with pytest.raises(InputError, match="makes 5 windows of 50 tokens"):
        split_windows(Windows.of(rest[:250], 50), search=30)


def test_the_smallest_plan_is_found_proved_and_made_again(
    rlquant: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(tiny.TEXT[30_000:])
    done = rlquant(
        "tune", model, "--text", text, *SHORT, "--calibration", calibration, "--out", tmp_path / "run"
    )
    assert done.status == 0, done.err
    told = json.loads((tmp_path / "run" / "tune.json").read_text())
    document = validate_results(json.loads((tmp_path / "run" / "results.json").read_text()))
    assert (tmp_path / "run" / "report.html").exists()
    row = next(row for row in document["rows"] if row["precision"] == told["chosen"]["precision"])
    assert row["retention"]["verdict"] == "retained"
    assert len(row["score"]["episodes"]) == 40
    assert document["settings"]["margin"] == pytest.approx(0.01)
    assert not any(trial["passed"] for trial in told["trials"] if trial["bytes"] < row["bytes"]["weights"])
    assert "is the cheapest that is proved" in done.out
    assert SPIKY in " ".join(done.out.split())
    assert not list((tmp_path / "run" / "pieces").glob("*.safetensors"))
    again = shlex.split(told["again"])
    assert again[:2] == ["rlquant", "quantize"]
    again[again.index("ARTIFACT")] = str(tmp_path / "again")
    assert rlquant(*again[1:]).status == 0
    tuned, made = (
        load_file(path / "model.safetensors") for path in (tmp_path / "run/artifact", tmp_path / "again")
    )
    assert tuned.keys() == made.keys()
    assert all(torch.equal(tensor, made[name]) for name, tensor in tuned.items())
    assert load(str(tmp_path / "run" / "artifact")).precision == told["chosen"]["precision"]


def test_the_memory_limit_holds_on_disk(rlquant: Run, model: Path, text: Path, tmp_path: Path) -> None:
    limit = 60_000
    options = ("--text", text, *SHORT, "--retain", 0.999, "--memory", limit, "--methods", "rtn,gptq")
    options += ("--widths", "8,5,4,3")
    done = rlquant("tune", model, *options, "--out", tmp_path)
    assert done.status in (0, 1), done.err
    with safe_open(tmp_path / "artifact" / "model.safetensors", framework="pt") as file:
        size = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118, it is no dict
    told = json.loads((tmp_path / "tune.json").read_text())
    assert size <= limit
    assert size == next(
        trial["bytes"] for trial in told["trials"] if trial["scheme"] == told["chosen"]["precision"]
    )
    assert all(trial["bytes"] <= limit for trial in told["trials"])
    assert {each["bits"] for each in told["sensitivity"] if each["layer"] != "embedding"} == {8, 5, 4, 3}
    assert f"schemes do not fit into {limit:,} bytes" in done.out
    again = shlex.split(told["again"])
    assert again[:2] == ["rlquant", "evaluate"]  # the text itself calibrated
    done = rlquant(*again[1:], "--window", 64, "--windows", 6, "--out", tmp_path / "again")
    assert done.status == 0, done.err
    scored = json.loads((tmp_path / "again" / "results.json").read_text())["rows"][1]["score"]["episodes"]
    artifact = load(str(tmp_path / "artifact"))
    losses = window_losses(artifact, Windows.of(artifact.tokens(tiny.TEXT), 64, limit=6))
    assert scored == pytest.approx((-losses).tolist(), rel=1e-6)


def test_an_impossible_goal_gives_the_best_found_and_says_by_how_much(
    rlquant: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    options = ("--text", text, *SHORT, "--retain", 1, "--bits", 1, "--methods", "rtn")
    done = rlquant("tune", model, *options, "--out", tmp_path)
    assert done.status == 1, done.err
    told = json.loads((tmp_path / "tune.json").read_text())
    assert told["chosen"]["held"] is False
    limit = tiny.model().num_parameters() // 8
    assert told["goal"]["memory"] == limit
    size = told["trials"][0]["bytes"]
    assert f"the memory by {size - limit:,} bytes" in done.out
    row = json.loads((tmp_path / "results.json").read_text())["rows"][1]
    short = 100 * (1 - row["retention"]["value"])
    assert f"misses the lead over uniform guessing by {short:.1f} points" in done.out
    assert weight_bytes(load(str(tmp_path / "artifact")).model) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --text FILE"),
        (("--retain", "1.5"), "above 0 and at most 1, not 1.5"),
        (("--memory", "lots"), "--memory 'lots' is not a positive quantity"),
        (("--bits", "0"), "--bits is what a weight may take on average, such as 4.5, not 0"),
        (("--widths", "8,7"), "--widths are some of 8, 6, 5, 4, 3, 2 bits, not 7"),
        (("--methods", "gtpq"), "Did you mean 'gptq'"),
        (("--methods", "smoothquant"), "method 'smoothquant' cannot do int8"),
        (("--env", "CartPole-v1"), "--env means nothing for"),
        (("--deadline", "1ms"), "--deadline means nothing for"),
        (("--windows", "0"), "windows must be at least 1"),
        (("--search-windows", "0"), "--search-windows must be at least 5, not 0"),
        (("--calibration", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--device", "tpu"), "unknown device 'tpu'"),
    ],
)
def test_bad_goals(
    rlquant: Run, model: Path, text: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    given = ("--text", text, *options) if options else ()
    done = rlquant("tune", model, *given, "--out", tmp_path)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "tune.json").exists()


def test_a_text_that_is_too_short(rlquant: Run, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(tiny.TEXT[:1000])
    done = rlquant("tune", model, "--text", text, *SHORT, "--out", tmp_path / "run")
    assert done.status == 2
    assert "the text makes 12 windows of 64 tokens, and a search needs at least 16" in done.err


def test_what_is_quantized_is_not_tuned(rlquant: Run, model: Path, text: Path, tmp_path: Path) -> None:
    assert rlquant("quantize", model, "--scheme", "int8", "--out", tmp_path / "small").status == 0
    done = rlquant("tune", tmp_path / "small", "--text", text, *SHORT, "--out", tmp_path / "run")
    assert done.status == 2
    assert "is quantized to int8 already; tune the float model" in done.err


def test_language_options_mean_nothing_for_an_agent(rlquant: Run, tmp_path: Path) -> None:
    done = rlquant("tune", "ppo-cartpole", "--bits", 4, "--window", 64, "--out", tmp_path)
    assert done.status == 2
    assert "--bits, --window means nothing for ppo-cartpole, which is a control policy" in done.err


def test_names_of_plans_are_short_where_people_read_them() -> None:
    chosen = {part: STEPS[8 if index % 2 else 3] for index, part in enumerate(parts_of(tiny.model()))}
    name = plan_of(chosen, "nf4-dq", "gptq").name
    assert short_name(name) == f"int3-g128-asym+embedding=nf4-dq+{name.count('+') - 1} exceptions"
    assert (
        short_name("int4-g128+layers.0.*=int8+embedding=int8") == "int4-g128+layers.0.*=int8+embedding=int8"
    )


def test_names_too_long_for_a_file_are_kept_apart(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, {})
    names = [f"int4+{'+'.join(f'layers.{i}.mlp.down_proj=int8' for i in range(40))}={end}" for end in "ab"]
    for name in names:
        folder.save_piece(name, {"of": name[-1]})
    assert [folder.piece(name) for name in names] == [{"of": "a"}, {"of": "b"}]


@pytest.mark.slow
def test_a_search_killed_half_way_gives_the_same_answer(model: Path, text: Path, tmp_path: Path) -> None:
    def start(folder: Path) -> subprocess.Popen[bytes]:
        options = ["--text", str(text), *map(str, SHORT), "--retain", "0.999", "--out", str(folder)]
        return subprocess.Popen([sys.executable, "-m", "rlquant", "tune", str(model), *options])

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    status = start(undisturbed).wait()
    for wanted in ("sensitivity-layers-0-int4.json", "audition-int*"):
        process = start(killed)
        deadline = time.monotonic() + 300
        while not list((killed / "pieces").glob(wanted)) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() != 0
        assert not (killed / "tune.json").exists()
    assert start(killed).wait() == status
    told = [json.loads((folder / "tune.json").read_text()) for folder in (undisturbed, killed)]
    assert told[0] == told[1]
    weights = [load_file(folder / "artifact" / "model.safetensors") for folder in (undisturbed, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
