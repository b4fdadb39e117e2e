"""The commands evaluate and quantize on a folder with a language model, as a user types them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlquant.errors import InputError
from rlquant.llm.load import load
from rlquant.llm.text import Windows, window_losses
from rlquant.measure import validate_results
from rlquant.sources import source_kind

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.TEXT)
    return path


def test_evaluate_a_model(rlquant: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{a} and 3 ", "chosen": f"make {a + 3}. ", "rejected": "ekam 9. "} for a in range(20, 26)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--text", text, "--window", 64, "--windows", 12, "--preferences", pairs, "--generate", "1,3")
    plans = ("--precisions", "fp32,int8,int3-g32,nf4+embedding=int8", "--methods", "rtn,gptq")
    done = rlquant("evaluate", folder, *options, *plans, "--out", tmp_path / "run")
    assert done.status == 0, done.err
    assert "calibrated on the last 20% of the text" in done.err
    document = validate_results(json.loads((tmp_path / "run" / "results.json").read_text()))
    assert document["subject"]["kind"] == "language"
    assert document["reference"]["random_score"] == pytest.approx(-math.log(260))
    assert [(row["precision"], row["method"]) for row in document["rows"]] == [
        ("fp32", "none"),
        *(
            (name, method)
            for name in ("int8", "int3-g32", "nf4+embedding=int8")
            for method in ("rtn", "gptq")
        ),
    ]
    lm = load(str(folder), dtype="fp32")
    windows = Windows.of(lm.tokens(tiny.TEXT)[: int(len(tiny.TEXT) * 0.8)], 64, limit=12)
    expected = -window_losses(lm, windows)
    assert document["rows"][0]["score"]["episodes"] == pytest.approx(expected.tolist(), rel=1e-6)
    by_name = {f"{row['precision']} {row['method']}": row for row in document["rows"]}
    language = {name: row["language"] for name, row in by_name.items()}
    assert language["fp32 none"]["perplexity"] == pytest.approx(math.exp(-expected.mean()))
    assert language["int3-g32 gptq"]["agreement"]["kl"] < language["int3-g32 rtn"]["agreement"]["kl"]
    assert by_name["int8 rtn"]["retention"]["verdict"] == "retained"
    assert language["int8 rtn"]["preferences"]["summed"] == 1.0
    assert [each["batch"] for each in language["int8 rtn"]["generation"]] == [1, 3]
    assert by_name["int8 rtn"]["latency_us"]["simulated"]
    assert not by_name["fp32 none"]["latency_us"]["simulated"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert windows.protocol in report
    assert "chosen likelier" in report
    again = rlquant("evaluate", folder, *options, *plans, "--out", tmp_path / "run")
    assert again.status == 0
    resumed = json.loads((tmp_path / "run" / "results.json").read_text())
    assert resumed["rows"] == document["rows"]


def test_another_text_of_the_same_name_is_read_anew(rlquant: Run, folder: Path, tmp_path: Path) -> None:
    text, scores = tmp_path / "text.txt", []
    for content in (tiny.TEXT, tiny.TEXT[9000:]):
        text.write_text(content)
        options = ("--text", text, "--window", 64, "--windows", 4, "--precisions", "fp32")
        assert rlquant("evaluate", folder, *options, "--out", tmp_path / "run").status == 0
        scores.append(json.loads((tmp_path / "run" / "results.json").read_text())["rows"][0]["score"])
    assert scores[0] != scores[1]


def test_a_quantized_cache_is_read_through(rlquant: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    from rlquant.llm.kv_cache import QuantizedCache

    lm = load(str(folder), dtype="fp32")
    windows = Windows.of(lm.tokens(tiny.TEXT), 192, limit=2)
    exact = window_losses(lm, windows)
    kept = window_losses(lm, windows, cache=lambda: QuantizedCache(lm.model.config, "int8", 16, 192))
    assert kept == pytest.approx(exact, rel=1e-4)
    rounded = window_losses(lm, windows, cache=lambda: QuantizedCache(lm.model.config, "int4", 16, 16))
    assert abs(rounded - exact).max() > abs(kept - exact).max()
    done = rlquant("evaluate", folder, "--text", text, "--kv-cache", "int9", "--out", tmp_path)
    assert done.status == 2
    assert "int9" in done.err


def test_what_a_quantized_cache_costs_is_a_row(
    rlquant: Run, folder: Path, text: Path, tmp_path: Path
) -> None:
    options = ("--text", text, "--window", 192, "--windows", 2, "--kv-cache", "int4", "--precisions", "int8")
    done = rlquant("evaluate", folder, *options, "--out", tmp_path)
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "fp32+kv=int4", "int8+kv=int4"]
    losses = [-row["score"]["mean"] for row in rows]
    lm = load(str(folder), dtype="fp32")
    windows = Windows.of(lm.tokens(tiny.TEXT), 192, limit=2)
    assert losses[0] == pytest.approx(window_losses(lm, windows).mean(), rel=1e-6)
    assert losses[1] != losses[0]
    assert rows[0]["language"]["agreement"] is None
    assert rows[1]["language"]["agreement"]["kl"] > 0


def test_quantize_a_model(rlquant: Run, folder: Path, text: Path, tmp_path: Path) -> None:
    options = (
        "--calibration",
        text,
        "--calibration-windows",
        8,
        "--calibration-length",
        48,
        "--dtype",
        "fp32",
    )
    plan = ("--scheme", "int4-g32+embedding=int8", "--method", "gptq")
    done = rlquant("quantize", folder, *plan, *options, "--out", tmp_path / "small")
    assert done.status == 0, done.err
    assert "int4-g32+embedding=int8 by gptq" in done.out
    assert not (tmp_path / "small" / "pieces").exists()
    lm = load(str(tmp_path / "small"))
    assert lm.method == "gptq"
    with torch.no_grad():
        made = lm.model.generate(torch.tensor([lm.tokens("12 and 7 ")]), max_new_tokens=5, do_sample=False)
    assert lm.tokenizer.decode(made[0]).startswith("12 and 7 make ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --text FILE"),
        (("--text", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--episodes", 3), "--episodes means nothing for"),
        (("--precisions", "int4-g12x"), "int4-g12x"),
        (("--methods", "gptqq"), "gptqq"),
        (("--window", 0), "window must be at least 1"),
        (("--generate", "one"), "no list of whole numbers"),
        (("--device", "tpu"), "unknown device 'tpu'"),
    ],
)
def test_bad_options(
    rlquant: Run, folder: Path, text: Path, tmp_path: Path, options: tuple[Any, ...], message: str
) -> None:
    given = options if not options or options[0] in ("--text",) else ("--text", text, *options)
    done = rlquant("evaluate", folder, *given, "--out", tmp_path / "run")
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_options_of_the_other_kind_are_refused(rlquant: Run, tmp_path: Path) -> None:
    done = rlquant("evaluate", "ppo-cartpole", "--window", 64, "--out", tmp_path)
    assert done.status == 2
    assert "--window means nothing for ppo-cartpole, which is a control policy" in done.err
    done = rlquant("bench", "ppo-cartpole", "--device", "cpu", "--out", tmp_path)
    assert "--device means nothing" in done.err
    done = rlquant("quantize", "ppo-cartpole", "--scheme", "int8", "--dtype", "fp32", "--out", tmp_path)
    assert "--dtype means nothing" in done.err


def test_kinds_are_read_off(folder: Path, tmp_path: Path) -> None:
    assert source_kind(str(folder)) == "language"
    assert source_kind("Qwen/Qwen2.5-0.5B@main") == "language"
    assert source_kind("ppo-cartpole") == "control"
    assert source_kind("agents/none.zip") == "control"
    (tmp_path / "config.json").write_text('{"policy": "MlpPolicy"}')
    assert source_kind(str(tmp_path)) == "control"
    (tmp_path / "a.gguf").touch()
    assert source_kind(str(tmp_path)) == "language"


def test_what_cannot_be_loaded_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    cases = {
        "nobody/nothing-of-this-name": "cannot be loaded",
        str(tmp_path): "holds no config.json",
        "just-a-word": "is no file or folder, and no Hub id",
    }
    for source, message in cases.items():
        with pytest.raises(InputError, match=message):
            load(source)
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        load(str(folder), dtype="int8")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="cannot be loaded"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "quantization_config": {"quant_method": "exl9"}}'
    )
    with pytest.raises(InputError, match="quantized by exl9, which is not read"):
        load(str(tmp_path))


def test_pickled_weights_need_trust(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(tiny.model().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(str(tmp_path), dtype="fp32")
    assert load(str(tmp_path), dtype="fp32", trust=True).parameters == tiny.model().num_parameters()


def test_bench_a_model(rlquant: Run, folder: Path, tmp_path: Path) -> None:
    options = (
        "--precisions",
        "fp32,int8,int4-g32",
        "--generate",
        "1,4",
        "--prompt-tokens",
        16,
        "--new-tokens",
        6,
    )
    done = rlquant("bench", folder, *options, "--out", tmp_path)
    assert done.status == 0, done.err
    document = json.loads((tmp_path / "bench.json").read_text())
    timings = document["timings"]
    assert [(each["precision"], each["batch"]) for each in timings] == [
        (name, batch) for name in ("fp32", "int8", "int4-g32") for batch in (1, 4)
    ]
    assert all(each["step"]["calls"] == 5 and each["tokens_per_second"] > 0 for each in timings)
    assert [each["step"]["simulated"] for each in timings] == [False] * 2 + [True] * 4
    assert timings[0]["weights"] > timings[2]["weights"] > timings[4]["weights"]
    done = rlquant("bench", folder, "--calls", 500, "--out", tmp_path)
    assert done.status == 2
    assert "--calls means nothing for" in done.err
