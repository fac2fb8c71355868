"""Writes a run's report: one self-contained HTML page, and the same tables for a terminal.

split.json, evaluate.json, audit.json and tune.json come in; report.html goes out. The pipeline and
the command line call it. Tables and sentences are pure Python; plotly and jinja2 are imported only
by ``write_report``.
"""

from merit_fast.report.advice import Advice, advise
from merit_fast.report.stage import print_summary, read_tuned, write_report
from merit_fast.report.summary import audit_sentence, split_lines, verdict
from merit_fast.report.tables import gain_rows, results_rows

__all__ = [
    "Advice",
    "advise",
    "audit_sentence",
    "gain_rows",
    "print_summary",
    "read_tuned",
    "results_rows",
    "split_lines",
    "verdict",
    "write_report",
]
