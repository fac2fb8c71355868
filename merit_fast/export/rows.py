"""Rows of one dataset's part, as they came and as conversations, in the order of the part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.conversation import Conversation
from merit_fast.data.rows.loss import messages_in_loss, train_on_of
from merit_fast.data.rows.reader import RowReader
from merit_fast.data.sources import read_raw_rows
from merit_fast.data.sources.readers.lines import parse_line


@dataclass(frozen=True)
class ExportRow:
    """One row of an exported file."""

    dataset: str
    number: int  # in the source, from 0
    raw: bytes | dict[str, object]  # the JSON text of its line, or its columns
    columns: dict[str, object]
    conversation: Conversation
    in_loss: tuple[bool, ...]  # of each message


@dataclass(frozen=True)
class PartRows:
    """Rows of a dataset that go into a file; they may be read any number of times.

    Attributes:
        numbers: ascending numbers in the source; a row that is trained twice is there twice.
    """

    config: DatasetConfig
    data_config: DataConfig
    part: Part
    numbers: tuple[int, ...]

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.config.name

    def __iter__(self) -> Iterator[ExportRow]:
        """Yields the rows.

        Raises:
            InputError: the source is no longer as it was selected.
        """
        place = source(self.config, self.part)
        assert place is not None
        reader = RowReader(self.config, self.data_config)
        train_on = train_on_of(self.config, self.data_config)
        counts = Counter(self.numbers)
        for (where, raw), (number, count) in zip(
            read_raw_rows(place, list(counts)), counts.items(), strict=True
        ):
            columns = parse_line(raw, where) if isinstance(raw, bytes) else raw
            conversation = reader.read(columns, where)
            mask = messages_in_loss(conversation, train_on)
            row = ExportRow(self.name, number, raw, columns, conversation, mask)
            for _ in range(count):
                yield row
