"""Reads rows of CSV and TSV files: a header, then cells of text."""

import csv
import io
from collections import Counter
from collections.abc import Iterator

from merit_fast.data.sources.readers.lines import RawRow
from merit_fast.data.sources.readers.opening import open_stream
from merit_fast.data.sources.readers.picker import Picker
from merit_fast.errors import InputError, one_line

_LONGEST_CELL = 2**31 - 1  # the module's own limit of 128 KiB is shorter than many answers


def table_rows(name: str, delimiter: str, picker: Picker) -> Iterator[RawRow]:
    """Yields one row per record; every value is text, and an empty cell is None.

    Raises:
        InputError: a column twice, a record with another number of cells, a quote that is not
            closed, or text that is no UTF-8; names file and line.
    """
    csv.field_size_limit(_LONGEST_CELL)
    with (
        open_stream(name) as stream,
        io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text,
    ):
        records = csv.reader(text, delimiter=delimiter, strict=True)
        line = 1
        header: list[str] = []
        try:
            while not picker.is_done and (cells := next(records, None)) is not None:
                place = f"{name}:{line}"
                line = records.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = _checked_header(cells, place)
                elif picker.take():
                    yield place, _row(header, cells, place)
        except csv.Error as error:
            raise InputError(f"{name}:{line}: must be a CSV record: {one_line(error)}") from None
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} in or after line {line}"
            raise InputError(f"{name}: must be UTF-8 text, got {byte}") from None


def _checked_header(cells: list[str], place: str) -> list[str]:
    names = [cell or f"Unnamed: {index}" for index, cell in enumerate(cells)]  # as datasets does
    column, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{place}: the header must name a column once, got {column!r} {count} times"
        )
    return names


def _row(header: list[str], cells: list[str], place: str) -> dict[str, str | None]:
    if len(cells) != len(header):
        raise InputError(
            f"{place}: must have {len(header)} cells as the header has, got {len(cells)}"
        )
    return {column: cell or None for column, cell in zip(header, cells, strict=True)}
