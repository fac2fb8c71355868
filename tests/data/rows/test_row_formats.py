"""The table of row formats: its examples convert, its columns are told apart, docs can print it."""

import itertools

import pytest

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.rows.columns import COMMON
from merit_fast.data.rows.formats import (
    FORMATS,
    common_columns_markdown,
    find_format,
    row_formats_markdown,
)
from merit_fast.data.rows.reader import RowReader
from merit_fast.errors import InputError

NAMES = [row_format.name for row_format in FORMATS]


def test_names_and_required_columns_differ():
    assert len(set(NAMES)) == len(FORMATS)
    assert len({row_format.required for row_format in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("row_format", FORMATS, ids=NAMES)
def test_the_example_is_recognised_and_converts(row_format):
    reader = RowReader(DatasetConfig("d", "x"), DataConfig())
    conversation = reader.read({**row_format.example, "id": 1, "empty": None}, "here")
    assert reader.format_name == row_format.name
    assert reader.notes() == ["columns not used: id"]
    assert [(message.role, message.content) for message in conversation.messages] == [
        ("user", "capital of France?"),
        ("assistant", "Paris"),
    ]


@pytest.mark.parametrize("row_format", FORMATS, ids=NAMES)
def test_every_name_of_every_column_is_read(row_format):
    """A row may spell each column in any of its names; two names of one column are one too many."""
    reader = RowReader(DatasetConfig("d", "x"), DataConfig())
    key = reader.read(dict(row_format.example), "here").key()
    columns = [column for column in row_format.columns if column.name in row_format.example]
    for names in itertools.product(*((column.name, *column.aliases) for column in columns)):
        row = {
            name: row_format.example[column.name]
            for name, column in zip(names, columns, strict=True)
        }
        fresh = RowReader(DatasetConfig("d", "x"), DataConfig())
        assert fresh.read(row, "here").key() == key
        for column in columns:
            for other in {column.name, *column.aliases} - set(names):
                with pytest.raises(InputError, match="column .* of dataset d: must be"):
                    fresh.read({**row, other: "x"}, "here")


@pytest.mark.parametrize("row_format", FORMATS, ids=NAMES)
def test_a_row_without_a_required_column_is_not_recognised(row_format):
    for column in row_format.required:
        row = {key: value for key, value in row_format.example.items() if key != column}
        with pytest.raises(InputError, match="here: unknown columns"):
            find_format([row_format], row, {}, "here")


def test_the_docs_tables_have_a_line_for_every_format_and_column():
    lines = row_formats_markdown().splitlines()
    assert len(lines) == 2 + len(FORMATS)
    for line, row_format in zip(lines[2:], FORMATS, strict=True):
        assert line.startswith(f"| {row_format.name} |") and row_format.description in line
        for column in row_format.columns:
            assert all(f"`{name}`" in line for name in (column.name, *column.aliases))
        assert line.count("|") == 5  # no cell breaks the table
    lines = common_columns_markdown().splitlines()
    assert len(lines) == 2 + len(COMMON)
    assert all(column.description in line for line, column in zip(lines[2:], COMMON, strict=True))
