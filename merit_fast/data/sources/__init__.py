"""Reads rows from files, directories and Hugging Face datasets; each row knows its place."""

from merit_fast.data.sources.content import source_content
from merit_fast.data.sources.places import (
    files_of,
    is_sliced,
    local_files,
    splits_of,
    unread_files,
)
from merit_fast.data.sources.read import PlacedRow, count_rows, read_raw_rows, read_rows
from merit_fast.data.sources.readers.lines import RawRow
from merit_fast.data.sources.source import Source

__all__ = [
    "PlacedRow",
    "RawRow",
    "Source",
    "count_rows",
    "files_of",
    "is_sliced",
    "local_files",
    "read_raw_rows",
    "read_rows",
    "source_content",
    "splits_of",
    "unread_files",
]
