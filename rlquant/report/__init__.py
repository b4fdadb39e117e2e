"""From a results document to what a person reads: a terminal table and one self-contained HTML file."""

from rlquant.report.bench import bench_lines, bench_table
from rlquant.report.html import render_report
from rlquant.report.language import generation_table, language_table
from rlquant.report.realtime import realtime_sentences, realtime_table
from rlquant.report.table import terminal_table, verdict_lines
from rlquant.report.tuning import front_table, sensitivity_table
from rlquant.report.wording import gain_sentence

__all__ = [
    "bench_lines",
    "bench_table",
    "front_table",
    "gain_sentence",
    "generation_table",
    "language_table",
    "realtime_sentences",
    "realtime_table",
    "render_report",
    "sensitivity_table",
    "terminal_table",
    "verdict_lines",
]
