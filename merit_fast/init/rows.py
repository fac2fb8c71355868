"""Reads every row of a source once, as a run does, and counts what it finds."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.conversation import Message
from merit_fast.data.images.marks import with_marks
from merit_fast.data.mixture.held_out import holds_out
from merit_fast.data.rows.reader import RowReader
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
        InputError: no row, a row of no known format, rows of two formats, a row without an
            answer, or a column that nothing reads; names file and line.
    """
    reader = RowReader(DatasetConfig("rows", str(path)), DataConfig())
    keys = bytearray()
    num_rows = num_characters = 0
    for where, row in read_rows(RowSource(str(path))):
        conversation = reader.read(row, where)
        answers = [turn for turn in conversation.messages if turn.role == "assistant"]
        num_rows += 1
        num_characters += sum(_count_characters(answer) for answer in answers)
        keys += with_marks(conversation, None).key()
    if not num_rows:
        raise InputError(f"{path}: must have at least one row, found none")
    hashes = np.frombuffer(bytes(keys), "S16")
    counts = ((share, int(holds_out(hashes, share).sum())) for share in _SHARES)
    divided = ((share, count) for share, count in counts if 0 < count < num_rows)
    return Source(reader.format_name, num_rows, num_characters, next(divided, None))


def _count_characters(message: Message) -> int:
    content = message.content or ""
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text", "")) for part in content)
