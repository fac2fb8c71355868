"""Reads rows from files, directories and Hugging Face datasets; each row knows its place."""

from merit_fast.data.sources.files import SUFFIXES, PlacedRow, local_files, read_rows
from merit_fast.data.sources.source import Source

__all__ = ["SUFFIXES", "PlacedRow", "Source", "local_files", "read_rows"]
