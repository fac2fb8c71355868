"""Writes one file of rows for each task of a dataset that mixes tasks.

    python split_tasks.py ROWS OUT --by COLUMN [--pattern REGEX]

ROWS is a JSON array, a JSONL file, or a folder of JSONL files. The task of a row is the text in
COLUMN; with --pattern it is what the first group of the expression matches there, for ids such as
`coco_caption_17`: --by id --pattern '(.*)_[0-9]+$'. Rows stay as they are. A name that begins or
ends with the word of a split, such as `digits_test`, gets the word task there, so that no task is
held out because of its name.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

_SPLIT = "train|training|validation|valid|dev|val|test|testing|eval|evaluation"
_FIRST = re.compile(rf"({_SPLIT})(?=[-._]|$)", re.IGNORECASE)
_LAST = re.compile(rf"(^|[-._])({_SPLIT})$", re.IGNORECASE)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with its place."""
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".json":
            for number, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
                yield f"{file}[{number}]", row
            continue
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}:{number}", json.loads(line)


def task_of(row: dict[str, Any], place: str, column: str, pattern: str | None) -> str:
    """The row's task."""
    if not isinstance(row.get(column), str):
        names = ", ".join(sorted(row))
        sys.exit(f"{place}: must have text in the column {column}; its columns are {names}")
    task = row[column]
    if pattern is not None:
        match = re.search(pattern, task)
        if match is None or not match.groups():
            sys.exit(f"{place}: {column}: must match {pattern} with a group, got {task!r}")
        task = match.group(1)
    return task


def file_name(task: str) -> str:
    """A task's file name without its suffix: letters, digits and no word of a split at its ends."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", task).strip("._-") or "unnamed"
    if _FIRST.match(name):
        name = f"task_{name}"
    return f"{name}_task" if _LAST.search(name) else name


def split_tasks(rows: Path, out: Path, column: str, pattern: str | None) -> dict[str, int]:
    """Writes ``out/TASK.jsonl`` for every task; returns the number of rows of each."""
    out.mkdir(parents=True)
    files: dict[str, TextIO] = {}
    tasks: dict[str, str] = {}
    counts: dict[str, int] = {}
    try:
        for place, row in read_rows(rows):
            task = task_of(row, place, column, pattern)
            name = file_name(task)
            if tasks.setdefault(name, task) != task:
                sys.exit(f"{place}: {column}: {task!r} and {tasks[name]!r} give one file, {name}")
            if name not in files:
                files[name] = (out / f"{name}.jsonl").open("w", encoding="utf-8")
            files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
            counts[name] = counts.get(name, 0) + 1
    finally:
        for file in files.values():
            file.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--by", required=True, metavar="COLUMN")
    parser.add_argument("--pattern", metavar="REGEX")
    arguments = parser.parse_args()
    if not arguments.rows.exists():
        sys.exit(f"{arguments.rows}: is not there")
    if arguments.out.exists():
        sys.exit(f"{arguments.out}: must not exist yet")
    counts = split_tasks(arguments.rows, arguments.out, arguments.by, arguments.pattern)
    for task, count in sorted(counts.items()):
        print(f"{count:8d} {task}")


if __name__ == "__main__":
    main()
