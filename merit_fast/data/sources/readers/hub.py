"""Reads rows of a dataset of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from merit_fast.data.paths import hub_trouble
from merit_fast.data.sources.readers.arrow import BATCH, converters_of
from merit_fast.data.sources.readers.lines import RawRow
from merit_fast.data.sources.source import Source
from merit_fast.errors import InputError


def hub_rows(source: Source, only: Iterable[int] | None) -> Iterator[RawRow]:
    """Yields the rows of a split; images come as their bytes or paths, not decoded.

    Raises:
        InputError: the hub gives nothing.
    """
    import datasets

    keys: dict[str, Any] = {"name": source.config, "revision": source.revision}
    keys["data_files"] = list(source.data_files) or None
    asked = {key: value for key, value in keys.items() if value is not None}
    try:
        rows = datasets.load_dataset(source.path, split=source.split, **asked)
    except Exception as error:  # the library has no common base for its errors
        described = ", ".join(f"{key} {value!r}" for key, value in asked.items())
        raise InputError(
            f"{source.path}: neither a file nor a folder, and {hub_trouble(error)} "
            f"(Hugging Face dataset, split {source.split!r}{', ' * bool(described)}{described})"
        ) from error
    numbers = range(len(rows)) if only is None else list(only)
    if only is not None:
        rows = rows.select(numbers)
    position = 0
    for table in rows.with_format("arrow").iter(batch_size=BATCH):
        converters = converters_of(table.schema)
        for row in table.to_pylist():
            for column, convert in converters.items():
                row[column] = convert(row[column])
            yield f"{source.path} ({source.split}): row {numbers[position] + 1}", row
            position += 1
