"""Encodes the rows of one dataset: row to conversation to examples within the length policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.conversation import Conversation
from merit_fast.data.dataset import IGNORED_LABEL, Example, count_target_tokens
from merit_fast.data.rows.reader import RowReader
from merit_fast.data.sources import PlacedRow
from merit_fast.data.template import ChatEncoder
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
        self._data_config = data_config
        self._encoder = ChatEncoder(tokenizer, data_config.chat_template)

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
        encoded = []
        for item in read:
            if isinstance(item, EncodedRow):
                encoded.append(item)
                continue
            try:
                encoded.append(self._encode(item.place, item))
            except InputError as error:
                encoded.append(EncodedRow(item.place, error=error))
        return encoded

    def _encode(self, place: str, conversation: Conversation) -> EncodedRow:
        messages = [message.for_template() for message in conversation.messages]
        rendered = self._encoder.render(messages, place)
        if not rendered:
            raise InputError(f"{place}: must have an answer of the assistant, found none")
        examples = []
        outcomes = ["rewritten"] if len(rendered) > 1 else []
        for example in self._encoder.encode(rendered):
            fitted, outcome = self._fit(example, place)
            examples += [fitted] if fitted else []
            outcomes += [outcome] if outcome else []
        return EncodedRow(place, tuple(examples), tuple(outcomes))

    def _fit(self, example: Example, place: str) -> tuple[Example | None, str | None]:
        """Applies `data.too_long`: the example, None if dropped; and the outcome."""
        length = len(example.input_ids)
        limit = self._data_config.max_length
        if length <= limit:
            return example, None
        if self._data_config.too_long == "error":
            rule = f"must have at most data.max_length = {limit} tokens"
            raise InputError(f"{place}: {rule}, got {length}")
        if self._data_config.too_long == "drop":
            return None, "dropped"
        labels = example.labels[:limit]
        if not count_target_tokens(labels):
            return None, "unanswered"
        end = int((labels != IGNORED_LABEL).nonzero()[0][-1]) + 1
        return Example(example.input_ids[:end].copy(), labels[:end].copy()), "truncated"
