"""The table of row formats: its examples convert, its columns are told apart, docs can print it."""

import pytest

from merit_fast.data.rows.formats import FORMATS, find_format, row_formats_markdown
from merit_fast.data.rows.messages import ROLES

NAMES = [row_format.name for row_format in FORMATS]


def test_names_and_required_columns_differ():
    assert len(set(NAMES)) == len(FORMATS)
    assert len({row_format.required for row_format in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize("row_format", FORMATS, ids=NAMES)
def test_the_example_is_recognised_and_converts(row_format):
    row = dict(row_format.example)
    assert find_format(row, "here") is row_format
    assert row_format.unused_columns({**row, "id": 1, "empty": None}) == {"id"}
    messages = row_format.convert(row, "here")
    assert all(message["role"] in ROLES for message in messages)
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "capital of France?"),
        ("assistant", "Paris"),
    ]


@pytest.mark.parametrize("row_format", FORMATS, ids=NAMES)
def test_a_row_without_a_required_column_is_not_recognised(row_format):
    for column in row_format.required:
        row = {key: value for key, value in row_format.example.items() if key != column}
        assert not row_format.matches(row)


def test_the_docs_table_has_a_line_for_every_format():
    lines = row_formats_markdown().splitlines()
    assert len(lines) == 2 + len(FORMATS)
    for line, row_format in zip(lines[2:], FORMATS, strict=True):
        assert line.startswith(f"| {row_format.name} |") and row_format.description in line
        assert all(f"`{column}`" in line for column in row_format.required + row_format.optional)
        assert line.count("|") == 5  # no cell breaks the table
