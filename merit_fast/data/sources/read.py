"""Reads rows from files, directories and Hugging Face datasets; each row knows its place."""

from collections.abc import Iterable, Iterator
from typing import Any

from merit_fast.data.paths import container_of
from merit_fast.data.sources.places import is_sliced, list_source, wanted_splits
from merit_fast.data.sources.readers.arrow import arrow_rows, count_arrow_rows, parquet_rows
from merit_fast.data.sources.readers.hub import hub_rows
from merit_fast.data.sources.readers.lines import RawRow, json_rows, parse_line
from merit_fast.data.sources.readers.picker import Picker
from merit_fast.data.sources.readers.tables import table_rows
from merit_fast.data.sources.slices import sliced_numbers
from merit_fast.data.sources.source import Source

PlacedRow = tuple[str, dict[str, Any]]  # place ("file:line") for error messages, columns


def read_rows(source: Source, only: Iterable[int] | None = None) -> Iterator[PlacedRow]:
    """Yields rows one at a time, in the order of the source.

    Args:
        source: the place of the rows.
        only: ascending row numbers from 0; other rows are skipped, without reading them where the
            container allows it. None: every row.

    Raises:
        InputError: the source is missing, unreadable or broken; the message names file and line,
            or file and row where there are no lines.
    """
    for place, row in read_raw_rows(source, only):
        yield place, parse_line(row, place) if isinstance(row, bytes) else row


def read_raw_rows(source: Source, only: Iterable[int] | None = None) -> Iterator[RawRow]:
    """Yields rows as they lie there: a line of JSON as its bytes, anything else as its columns.

    Args:
        source: the place of the rows.
        only: as for ``read_rows``.

    Raises:
        InputError: as for ``read_rows``; a line is not parsed.
    """
    listing = list_source(source)
    if listing is None:
        yield from hub_rows(source, only)
        return
    splits = wanted_splits(source, listing)
    files = [file for split in splits for file in listing.splits[split]]
    if is_sliced(source.split):
        counts = {split: _count(listing.splits[split]) for split in splits}
        only = sliced_numbers(source, counts, only)
    picker = Picker(only)
    for file in files:
        if picker.is_done:
            return
        yield from _file_rows(file, picker)


def count_rows(source: Source) -> int | None:
    """Number of rows where metadata tell it, as for Parquet and Arrow; else None.

    Raises:
        InputError: the source is missing or unreadable.
    """
    listing = list_source(source)
    if listing is None or is_sliced(source.split):
        return None
    total = 0
    for split in wanted_splits(source, listing):
        for file in listing.splits[split]:
            container = container_of(file)
            if container not in (".parquet", ".arrow"):
                return None
            total += count_arrow_rows(file, container == ".parquet")
    return total


def _count(files: list[str]) -> int:
    """Number of rows, by reading them where no metadata tell it."""
    total = 0
    for file in files:
        container = container_of(file)
        if container in (".parquet", ".arrow"):
            total += count_arrow_rows(file, container == ".parquet")
        else:
            total += sum(1 for _ in _file_rows(file, Picker()))
    return total


def _file_rows(file: str, picker: Picker) -> Iterator[RawRow]:
    container = container_of(file.partition("?")[0] if "://" in file else file)
    if container == ".parquet":
        return parquet_rows(file, picker)
    if container == ".arrow":
        return arrow_rows(file, picker)
    if container in (".csv", ".tsv"):
        return table_rows(file, "," if container == ".csv" else "\t", picker)
    return json_rows(file, picker)
