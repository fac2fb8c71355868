"""One row read alone: the conversation, or the message that refuses it."""

from typing import Any

import pytest
from support.data.rows import Row

from merit_fast.data import DataConfig, DatasetConfig
from merit_fast.data.conversation import Conversation
from merit_fast.data.rows.reader import RowReader
from merit_fast.errors import InputError


def read(row: Any, data: DataConfig | None = None, **keys: Any) -> Conversation:
    return RowReader(DatasetConfig("d", "x", **keys), data or DataConfig()).read(row, "here")


def for_template(conversation: Conversation) -> list[Row]:
    return [message.for_template() for message in conversation.messages]


def refusal(row: Any, data: DataConfig | None = None, **keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(row, data, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message
