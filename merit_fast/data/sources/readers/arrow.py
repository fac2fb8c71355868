"""Reads rows of Parquet and Arrow files, in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from merit_fast.data.sources.readers.lines import RawRow
from merit_fast.data.sources.readers.opening import open_file
from merit_fast.data.sources.readers.picker import Picker
from merit_fast.errors import InputError, one_line

if TYPE_CHECKING:
    import pyarrow

BATCH = 256  # rows; images may lie in them
_FEW = 8  # one row in so many is read by itself
_FILE_MAGIC = b"ARROW1"
Converter = Callable[[Any], Any]


def parquet_rows(name: str, picker: Picker) -> Iterator[RawRow]:
    """Yields the rows of a Parquet file; reads no row group of which no row is wanted.

    Raises:
        InputError: the file is unreadable; names file and row.
    """
    import pyarrow.parquet

    counter = _Counter(name, "Parquet")
    with open_file(name) as file, counter.reading(), pyarrow.parquet.ParquetFile(file) as parquet:
        converters = converters_of(parquet.schema_arrow)
        for group in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(group).num_rows
            if picker.is_done:
                return
            if picker.skip(count):
                counter.number += count
                continue
            for batch in parquet.iter_batches(BATCH, row_groups=[group]):
                yield from counter.rows(batch, converters, picker)


def arrow_rows(name: str, picker: Picker) -> Iterator[RawRow]:
    """Yields the rows of an Arrow file or stream, the form of ``save_to_disk`` too.

    Raises:
        InputError: the file is unreadable; names file and row.
    """
    counter = _Counter(name, "Arrow")
    with open_file(name) as file, counter.reading():
        for batch in _batches(file):
            if picker.is_done:
                return
            if picker.skip(batch.num_rows):
                counter.number += batch.num_rows
                continue
            converters = converters_of(batch.schema)
            for start in range(0, batch.num_rows, BATCH):
                yield from counter.rows(batch.slice(start, BATCH), converters, picker)


def count_arrow_rows(name: str, is_parquet: bool) -> int:
    """Number of rows, from the file's metadata.

    Raises:
        InputError: the file is unreadable.
    """
    import pyarrow.parquet

    counter = _Counter(name, "Parquet" if is_parquet else "Arrow")
    with open_file(name) as file, counter.reading():
        if is_parquet:
            return int(pyarrow.parquet.read_metadata(file).num_rows)
        return sum(batch.num_rows for batch in _batches(file))


def _batches(file: Any) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.ipc

    is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    file.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(file)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from pyarrow.ipc.open_stream(file)


class _Counter:
    """Counts the rows of a file, which has no lines to name."""

    def __init__(self, name: str, container: str) -> None:
        self.name = name
        self.number = 0
        self._container = container

    def rows(
        self, batch: pyarrow.RecordBatch, converters: dict[str, Converter], picker: Picker
    ) -> Iterator[RawRow]:
        num_rows = batch.num_rows
        wanted = [index for index in range(num_rows) if picker.take()]
        if len(wanted) * _FEW < num_rows:
            rows = [batch.slice(index, 1).to_pylist()[0] for index in wanted]
        else:
            every = batch.to_pylist()
            rows = [every[index] for index in wanted]
        first = self.number + 1
        self.number += num_rows
        for index, row in zip(wanted, rows, strict=True):
            for column, convert in converters.items():
                row[column] = convert(row[column])
            yield f"{self.name}: row {first + index}", row

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turns an error of the library into one that names file and row."""
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            after = f"after row {self.number}"
            raise InputError(
                f"{self.name}: is not readable {self._container} {after}: {one_line(error)}"
            ) from None


# ---- values
def converters_of(schema: pyarrow.Schema) -> dict[str, Converter]:
    """Column -> conversion to the value that was written, where Arrow holds another."""
    found = {field.name: _converter(field.type) for field in schema}
    return {column: convert for column, convert in found.items() if convert}


def _converter(kind: pyarrow.DataType) -> Converter | None:
    """Drops the nulls with which Arrow fills structs, and reads its JSON texts."""
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        fields = {
            kind.field(i).name: _converter(kind.field(i).type) for i in range(kind.num_fields)
        }
        return lambda value: None if value is None else _filled(value, fields)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _converter(kind.value_type)
        if item is None:
            return None
        return lambda values: None if values is None else [item(value) for value in values]
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda text: None if text is None else json.loads(text)
    return None


def _filled(value: dict[str, Any], fields: dict[str, Converter | None]) -> dict[str, Any]:
    kept = {}
    for name, item in value.items():
        if item is not None:
            convert = fields[name]
            kept[name] = convert(item) if convert else item
    return kept
