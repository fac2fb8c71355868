"""Reads the rows of one dataset, all of one format, as conversations."""

from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.rows.formats import Format, find_format
from merit_fast.errors import InputError


class RowReader:
    """The format of a dataset's rows, found at its first row, and what its notes report."""

    def __init__(self, config: DatasetConfig, data_config: DataConfig) -> None:
        self.config = config
        self.data_config = data_config
        self._format: Format | None = None
        self._unused: set[str] = set()

    @property
    def format_name(self) -> str:
        """The name of the rows' format; "" before the first row."""
        return self._format.name if self._format else ""

    def read(self, row: dict[str, Any], place: str) -> Conversation:
        """Converts one row.

        Raises:
            InputError: the row is of no known format, of another than those before it, or broken.
        """
        row_format = find_format(row, place)
        self._format = self._format or row_format
        if row_format is not self._format:
            raise InputError(
                f"{place}: must be of the kind of the rows before it ({self._format.name}: "
                f"{', '.join(self._format.required)}), got {', '.join(row)}"
            )
        self._unused |= row_format.unused_columns(row)
        messages = row_format.convert(row, place)
        return Conversation(
            place, tuple(Message(message["role"], message["content"]) for message in messages)
        )

    def notes(self) -> list[str]:
        """One sentence on each thing that a user should know about the rows read so far."""
        unused = ", ".join(sorted(self._unused))
        return [f"columns not used: {unused}"] if unused else []
