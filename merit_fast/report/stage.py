"""The report stage: writes the HTML page of a run, and prints its tables in a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import (
    TUNE_FILE,
    AuditManifest,
    EvaluateManifest,
    SplitManifest,
    TuneManifest,
)
from merit_fast.report.summary import verdict
from merit_fast.report.tables import gain_rows, results_rows, tuning_rows


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
    """Writes the page atomically.

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
    """
    from merit_fast.report.page import render_page

    page = render_page(split, evaluation, title, notes, audit, tuned or {})
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def read_tuned(output: Path, evaluation: EvaluateManifest) -> dict[str, TuneManifest]:
    """Reads tune.json of every merged arm of a run that has one."""
    files = {arm: output / "merged" / arm / TUNE_FILE for arm in evaluation.merging_gain}
    return {arm: read_manifest(TuneManifest, file) for arm, file in files.items() if file.exists()}


def print_summary(output: Path) -> None:
    """Prints a finished run's results table, merging gains and the path of its report."""
    from rich.console import Console
    from rich.table import Table

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
    for columns, rows in tables:
        table = Table(box=None, pad_edge=False)
        table.add_column(columns[0], no_wrap=True)
        for column in columns[1:]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    console.print(" ".join(verdict(split)), soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"report: {output / 'report' / 'report.html'}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
