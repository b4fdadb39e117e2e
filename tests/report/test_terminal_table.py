"""The terminal output: complete in 80 columns, loud about losses with and without colour."""

import pytest
import sample_documents as samples
from rich.console import Console

from rlquant.report import terminal_table, verdict_lines


def printed(document, width, **options):
    console = Console(width=width, record=True, file=open("/dev/null", "w"), **options)  # noqa: SIM115
    console.print(terminal_table(document, width))
    for line in verdict_lines(document):
        console.print(line)
    return console.export_text(styles=options.get("force_terminal", False))


@pytest.mark.parametrize("make", samples.ALL)
@pytest.mark.parametrize("width", [80, 100, 120])
def test_nothing_is_cut_off(make, width):
    document = make()
    text = printed(document, width, no_color=True)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    table = text.splitlines()
    for row in document["rows"]:
        assert any(line.startswith(row["precision"]) for line in table)


def test_a_long_name_is_folded_not_cut():
    document = samples.heavy_loss()
    document["rows"][2]["precision"] = "w4a8-g128-asym-tensor-with-a-tail"
    lines = printed(document, 80, no_color=True).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("w4a8"))
    name = "".join(line.split(" ")[0] for line in lines[start : start + 4])
    assert name.startswith("w4a8-g128-asym-tensor-with-a-tail")
    assert "LOST" in lines[start]


def test_a_loss_is_loud_without_colour():
    text = printed(samples.heavy_loss(), 80, no_color=True)
    assert text.count("LOST") == 2
    assert "int8 LOSES 92.6% of the reward." in text
    assert "\x1b" not in text


def test_a_loss_is_bold_red_and_comes_first():
    first = verdict_lines(samples.heavy_loss())[0]
    assert first.plain.startswith("int4 LOSES ALL of the reward")
    assert {str(span.style) for span in first.spans if span.start == 0} == {"bold red"}
    assert "\x1b[1;31m" in printed(
        samples.heavy_loss(), 80, force_terminal=True, color_system="standard", legacy_windows=False
    )


def test_wide_terminals_show_more():
    wide, narrow = (printed(samples.heavy_loss(), width, no_color=True) for width in (120, 80))
    assert wide.splitlines()[0] != narrow.splitlines()[0]
    for header in ("IQM", "worst 10%", "p99 us", "agree"):
        assert header in wide
        assert header not in narrow


def test_simulated_latencies_are_marked_and_real_ones_are_not():
    document = samples.heavy_loss()
    lines = printed(document, 80, no_color=True).splitlines()
    assert next(line for line in lines if line.startswith("int8")).split()[-1].startswith("~")
    assert not next(line for line in lines if line.startswith("fp32")).split()[-1].startswith("~")
    for row in document["rows"]:
        row["latency_us"]["simulated"] = False
    assert "simulated" not in printed(document, 80, no_color=True)


def test_a_name_is_not_read_as_markup():
    document = samples.heavy_loss()
    document["rows"][2]["precision"] = "[red]x[/red]"
    assert "[red]x[/red] LOSES" in printed(document, 120, no_color=True)
