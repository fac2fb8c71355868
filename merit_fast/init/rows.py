"""Reads every row of a source once, as a run does, and counts what it finds."""

from dataclasses import dataclass
from pathlib import Path

from merit_fast.data.mixture.held_out import holds_out
from merit_fast.data.rows.formats import find_format
from merit_fast.data.sources import Source as RowSource
from merit_fast.data.sources import read_rows
from merit_fast.errors import InputError

_SHARES = (0.1, 0.25, 0.5)  # of a dataset without held-out rows: the first that gives both parts


@dataclass(frozen=True)
class Source:
    """The content of a file or directory of rows."""

    format: str
    num_rows: int
    num_characters: int  # of the assistant's answers
    held_out: tuple[float, int] | None  # a share that divides the rows, and the rows it holds out


def read_source(path: Path) -> Source:
    """Converts every row of a file or directory.

    Raises:
        InputError: no row, a row of no known format, rows of two formats, or a row without an
            answer; names file and line.
    """
    tests = {share: holds_out(share) for share in _SHARES}
    counts = dict.fromkeys(_SHARES, 0)
    name = ""
    num_rows = num_characters = 0
    for where, row in read_rows(RowSource(str(path))):
        row_format = find_format(row, where)
        name = name or row_format.name
        if row_format.name != name:
            raise InputError(f"{where}: {row_format.name}, but the rows before it are {name}")
        messages = row_format.convert(row, where)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not answers:
            raise InputError(f"{where}: must have an answer of the assistant, found none")
        num_rows += 1
        num_characters += sum(map(len, answers))
        for share, is_held_out in tests.items():
            counts[share] += is_held_out(row)
    if not num_rows:
        raise InputError(f"{path}: must have at least one row, found none")
    divided = ((share, count) for share, count in counts.items() if 0 < count < num_rows)
    return Source(name, num_rows, num_characters, next(divided, None))
