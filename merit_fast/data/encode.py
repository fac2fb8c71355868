"""Encodes the rows of one dataset: row to conversation to examples within the length policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.conversation import Conversation
from merit_fast.data.dataset import Example
from merit_fast.data.images import ImageEncoder, is_processor
from merit_fast.data.rows.loss import train_on_of
from merit_fast.data.rows.reader import RowReader
from merit_fast.data.sources import PlacedRow
from merit_fast.data.template import ChatEncoder, Encoded
from merit_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """The examples of one row; none where the row is left out.

    Attributes:
        outcomes: words counted in the dataset's notes, such as truncated, dropped, rewritten.
        error: the row is bad; ``data.bad_rows`` decides whether it may be skipped.
    """

    place: str
    examples: tuple[Example, ...] = ()
    outcomes: tuple[str, ...] = ()
    error: InputError | None = None


class RowEncoder:
    """Encodes rows of one dataset. It may be made again in another process from its arguments.

    Args:
        config: the dataset's entry.
        data_config: the `data:` section.
        tokenizer: a fast tokenizer, or a processor that holds one.
    """

    def __init__(self, config: DatasetConfig, data_config: DataConfig, tokenizer: Any) -> None:
        self.reader = RowReader(config, data_config)
        self._train_on = train_on_of(config, data_config)
        self._encoder: ChatEncoder | ImageEncoder
        if is_processor(tokenizer):
            self._encoder = ImageEncoder(tokenizer, data_config, config.media)
        else:
            self._encoder = ChatEncoder(tokenizer, data_config)

    def encode(self, rows: Sequence[PlacedRow]) -> list[EncodedRow]:
        """Encodes rows in their order, in one call of the tokenizer; a bad row raises nothing."""
        return self.encode_read(self.read(rows))

    def read(self, rows: Sequence[PlacedRow]) -> list[Conversation | EncodedRow]:
        """Reads rows in their order; a bad row gives an EncodedRow with its error."""
        read: list[Conversation | EncodedRow] = []
        for place, row in rows:
            try:
                read.append(self.reader.read(row, place))
            except InputError as error:
                read.append(EncodedRow(place, error=error))
        return read

    def encode_read(self, read: Sequence[Conversation | EncodedRow]) -> list[EncodedRow]:
        """Encodes the results of ``read``, of this encoder or of one in another process."""
        if isinstance(self._encoder, ChatEncoder):
            read = [_without_images(item) for item in read]
        conversations = [item for item in read if isinstance(item, Conversation)]
        encoded = iter(self._encoder.encode(conversations, self._train_on))
        return [
            item if isinstance(item, EncodedRow) else _encoded_row(item.place, next(encoded))
            for item in read
        ]

    def notes(self) -> list[str]:
        """One sentence on each thing that a user should know about the rows encoded so far."""
        return [*self.reader.notes(), *self._encoder.notes()]


def _without_images(item: Conversation | EncodedRow) -> Conversation | EncodedRow:
    """The item, or the error that a model of text cannot read its images."""
    if isinstance(item, EncodedRow) or not item.images:
        return item
    rule = f"{item.place}: must be text: the row has images, and the model reads none"
    return EncodedRow(item.place, error=InputError(rule))


def _encoded_row(place: str, encoded: Encoded) -> EncodedRow:
    return EncodedRow(place, encoded.examples, encoded.outcomes, encoded.error)
