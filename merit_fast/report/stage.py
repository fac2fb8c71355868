"""The report stage: writes the HTML page of a run, and prints its tables in a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.errors import write_error
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import (
    TUNE_FILE,
    AuditManifest,
    EvaluateManifest,
    SplitManifest,
    TuneManifest,
)
from merit_fast.report.downloads import branch_steps, check_lengths, data_files, report_data
from merit_fast.report.measured import measured_sentences
from merit_fast.report.split_tables import control_note
from merit_fast.report.summary import verdict
from merit_fast.report.tables import Table, gain_rows, results_rows, tuning_rows

if TYPE_CHECKING:
    from rich.console import Console

_GAP = 2  # spaces between the columns of a table


def write_report(
    split: SplitManifest,
    evaluation: EvaluateManifest | None,
    path: Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    audit: AuditManifest | None = None,
    tuned: Mapping[str, TuneManifest] | None = None,
) -> None:
    """Writes the page, and next to it its figures as report.json and CSV files, each atomically.

    The same arguments give the same bytes. The page loads nothing from the network.

    Args:
        split: the split and its figures.
        evaluation: None for a run that stopped after the split.
        path: the HTML file to write.
        title: heading of the page, plain text.
        notes: lines for "How this was made" (seeds, commands, versions), plain text.
        audit: None if the merges were not audited.
        tuned: merged arm -> the numbers that held-out rows chose for it.

    Raises:
        InputError: a field of ``split`` has the wrong length, or the file cannot be written.
        MeritFastError: the disk is full.
    """
    from merit_fast.report.page import render_page

    check_lengths(split)
    data = report_data(split, evaluation, title)
    page = render_page(split, evaluation, data, notes, audit, tuned or {})
    try:
        for name, text in data_files(data).items():
            write_text(path.parent / name, text)
        write_text(path, page)
    except OSError as error:
        raise write_error(path, error) from None


def read_tuned(output: Path, evaluation: EvaluateManifest) -> dict[str, TuneManifest]:
    """Reads tune.json of every merged arm of a run that has one."""
    files = {arm: output / "merged" / arm / TUNE_FILE for arm in evaluation.merging_gain}
    return {arm: read_manifest(TuneManifest, file) for arm, file in files.items() if file.exists()}


def print_summary(output: Path) -> None:
    """Prints a finished run's answer, results tables, merging gains and the path of its report."""
    from rich.console import Console

    evaluation = read_manifest(EvaluateManifest, output / "evaluate" / "evaluate.json")
    split = read_manifest(SplitManifest, output / "split" / "split.json")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log file has no width
    tuned = read_tuned(output, evaluation)
    tables = [
        results_rows(evaluation),
        gain_rows(evaluation),
        *([tuning_rows(tuned)] if tuned else []),
    ]
    for table in tables:
        for block in stacked(table, console.width):
            _print_table(console, block)
    advice, *grounds = verdict(split, branch_steps(split, evaluation))
    before = f"Before training, from the split only: {advice}"
    sentences = [*measured_sentences(evaluation), control_note(split), before, *grounds]
    for text in (
        " ".join(filter(None, sentences)),
        f"report: {output / 'report' / 'report.html'}",
    ):
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def stacked(table: Table, width: int) -> tuple[Table, ...]:
    """Cuts a table into tables that fit ``width`` columns; each repeats the first column.

    So a narrow terminal shows every figure. Headings may break at their spaces.
    """
    columns, rows = table
    widths = _widths(table)
    blocks: list[list[int]] = [[]]
    used = widths[0]
    for i in range(1, len(columns)):
        if blocks[-1] and used + _GAP + widths[i] > width:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(i)
        used += _GAP + widths[i]
    return tuple(
        (
            (columns[0], *(columns[i] for i in block)),
            tuple((row[0], *(row[i] for i in block)) for row in rows),
        )
        for block in blocks
    )


def _widths(table: Table) -> list[int]:
    """Width of each column: its longest cell, or the longest word of its heading."""
    columns, rows = table
    widths = [max(map(len, column.split())) for column in columns]
    return [max([width, *(len(row[i]) for row in rows)]) for i, width in enumerate(widths)]


def _print_table(console: "Console", table: Table) -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    columns, rows = table
    widths = _widths(table)
    shown = RichTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for i, (column, width) in enumerate(zip(columns, widths, strict=True)):
        # only a cell wider than the terminal is broken into lines
        width = min(width, console.width - (widths[0] + _GAP if i else 0))
        shown.add_column(column, justify="right" if i else "left", width=max(1, width))
    for row in rows:
        shown.add_row(*map(Text, row))
    console.print(shown)
    console.print()
