"""Reads rows from files, directories and Hugging Face datasets; each row knows its place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merit_fast.data.paths import hub_trouble, is_hub_id
from merit_fast.data.sources.nulls import without_filled_nulls
from merit_fast.errors import InputError, one_line

SUFFIXES = (".jsonl", ".parquet")
PlacedRow = tuple[str, dict[str, Any]]  # place ("file:line") for error messages, columns

_NO_ARRAY = "; one object per line is needed, not an array"
_BOM = b"\xef\xbb\xbf"


def local_files(path: str) -> list[Path] | None:
    """The files behind a local path, in reading order; None for a Hugging Face dataset id.

    A directory stands for the .jsonl and .parquet files directly in it, sorted by name. A local
    path wins over a dataset id of the same name.

    Raises:
        InputError: the path does not exist and cannot be a dataset id, or a directory holds no
            such file.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(
            f for f in local.iterdir() if f.suffix in SUFFIXES and f.is_file() and f.name[0] != "."
        )
        if not files:
            raise InputError(
                f"{path}: the directory must hold .jsonl or .parquet files, found none"
            )
        return files
    if local.exists():
        return [local]
    if is_hub_id(path):
        return None
    raise InputError(f"{path}: is neither a file, nor a directory, nor a Hugging Face dataset id")


def read_rows(path: str, split: str) -> Iterator[PlacedRow]:
    """Yields the rows of a file, a directory or a Hugging Face dataset, one at a time.

    Args:
        path: as in `mixture:`; relative to the current directory.
        split: the split of a Hugging Face dataset; local files have none.

    Raises:
        InputError: the source is missing, unreadable or broken; the message names file and line,
            for Parquet file and row.
    """
    files = local_files(path)
    if files is None:
        yield from _hub_rows(path, split)
        return
    for file in files:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _jsonl_rows(file)


def _jsonl_rows(file: Path) -> Iterator[PlacedRow]:
    try:
        # read as bytes: only \n ends a line, and an encoding error can name its line
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    where = f"{file}:{number}"
                    yield where, _parse_line(line.rstrip(), where)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise InputError(f"{where}: must be UTF-8 text, got {byte}") from None
    except json.JSONDecodeError as error:
        hint = _NO_ARRAY if line.lstrip()[:1] == b"[" else ""
        raise InputError(
            f"{where}: must be one JSON object: {error.msg} at column {error.colno}{hint}"
        ) from None
    # an integer of thousands of digits, or endless nesting
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: must be one JSON object: {one_line(error)}") from None
    if not isinstance(row, dict):
        hint = _NO_ARRAY if isinstance(row, list) else ""
        raise InputError(f"{where}: must be a JSON object {{...}}, got {type(row).__name__}{hint}")
    return row


def _parquet_rows(file: Path) -> Iterator[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", without_filled_nulls(row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"{file}: is not readable Parquet after row {number}: {one_line(error)}"
        ) from None


def _hub_rows(dataset_id: str, split: str) -> Iterator[PlacedRow]:
    import datasets

    try:
        rows = datasets.load_dataset(dataset_id, split=split)
    except Exception as error:  # the library has no common base for its errors
        raise InputError(
            f"{dataset_id}: neither a file nor a folder, and {hub_trouble(error)} "
            f"(Hugging Face dataset, split {split!r})"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{dataset_id} ({split}): row {number}", without_filled_nulls(row)
