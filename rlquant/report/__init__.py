"""From a results document to what a person reads: a terminal table and one self-contained HTML file."""

from rlquant.report.html import render_report
from rlquant.report.table import terminal_table, verdict_lines

__all__ = ["render_report", "terminal_table", "verdict_lines"]
