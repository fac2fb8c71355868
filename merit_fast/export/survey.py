"""Looks through the rows of a dataset: which columns, words and marks a stack has to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from merit_fast.data.conversation import Conversation
from merit_fast.data.rows.formats import FORMATS
from merit_fast.data.rows.roles import role_words
from merit_fast.export.rows import ExportRow, PartRows

_LISTS = {"messages": "messages", "sharegpt": "conversations"}  # format -> column of its turns
_TURN_KEYS = (("role", "content"), ("from", "value"))


@dataclass
class Survey:
    """Facts about the rows of one dataset, in all parts that are exported.

    Attributes:
        columns: every column that a row has.
        sources: name that a format reads -> the columns that hold it.
        turn_keys: (key of the role, key of the content) of the turns; None: more than one pair.
        words: role -> the words for it in the turns.
        other_keys: further keys of the turns.
        answers_only: the loss covers the assistant's messages, all of them and no others.
        last_only: the loss covers the last message and no other.
        fields: (role, further field of a message) -> the place of the first row that has it.
        followers: (role, role of the next message) -> the place of the first row that has them; ""
            stands before the first message and after the last.
        loss_roles: roles of the messages in the loss.
        ends_in_loss: the last message of every row is in the loss.
        shape: (place of a value in a row, its type) of all values but null.
    """

    name: str
    media: str | None
    format_name: str = ""
    columns: dict[str, None] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    turn_keys: tuple[str, str] | None = None
    words: dict[str, set[str]] = field(default_factory=dict)
    other_keys: set[str] = field(default_factory=set)
    is_plain: bool = True  # no content is a list of parts
    answers_only: bool = True
    last_only: bool = True
    alternates: bool = True
    ends_in_loss: bool = True
    loss_roles: set[str] = field(default_factory=set)
    has_tools: bool = False
    has_images: bool = False
    has_fields: bool = False
    fields: dict[tuple[str, str], str] = field(default_factory=dict)
    followers: dict[tuple[str, str], str] = field(default_factory=dict)
    template_arguments: set[str] = field(default_factory=set)
    shape: set[tuple[str, str]] = field(default_factory=set)

    @property
    def turns_column(self) -> str | None:
        """The column that holds the turns; None for a format without one."""
        name = _LISTS.get(self.format_name, "")
        columns = self.sources.get(name, ())
        return columns[0] if len(columns) == 1 else None

    def column(self, name: str) -> str | None:
        """The one column that holds ``name``; None if there is none or more than one."""
        columns = self.sources.get(name, ())
        return columns[0] if len(columns) == 1 else None

    def is_split(self, name: str) -> bool:
        """Whether several columns hold ``name``, in different rows."""
        return len(self.sources.get(name, ())) > 1


def survey(parts: Iterable[PartRows]) -> Survey:
    """Reads all parts of one dataset.

    Raises:
        InputError: a row cannot be read.
    """
    found: Survey | None = None
    words: dict[str, str] = {}
    for part in parts:
        if found is None:
            found = Survey(part.name, part.config.media)
            words = role_words(part.config.roles, f"mixture: {part.name}")
        mapping = part.config.columns or {}
        own = (mapping.get("role", "role"), mapping.get("content", "content"))
        for row in part:
            found.columns |= dict.fromkeys(row.columns)
            _add(found, row)
            _add_shape(found.shape, "", row.columns)
            for turn in _turns(row):
                _add_turn(found, turn, words, (own, *_TURN_KEYS))
        _find_sources(found, mapping)
    assert found is not None
    return found


def is_alternating(conversation: Conversation) -> bool:
    """Whether turns of user or tool and of the assistant take turns, after a system message."""
    roles = [message.role for message in conversation.messages]
    roles = roles[1:] if roles[0] == "system" else roles
    asks = all(role in ("user", "tool") for role in roles[::2])
    return asks and len(roles) % 2 == 0 and all(role == "assistant" for role in roles[1::2])


def _find_sources(found: Survey, mapping: dict[str, str]) -> None:
    columns = tuple(found.columns)
    for candidate in FORMATS:
        sources = candidate.sources(columns, mapping)
        if sources is not None:
            found.format_name = candidate.name
            found.sources = sources
            return


def _add(found: Survey, row: ExportRow) -> None:
    messages = row.conversation.messages
    answers = tuple(message.role == "assistant" for message in messages)
    found.answers_only &= row.in_loss == answers
    found.last_only &= row.in_loss == tuple(i == len(messages) - 1 for i in range(len(messages)))
    found.alternates &= is_alternating(row.conversation)
    found.ends_in_loss &= row.in_loss[-1]
    marked = zip(messages, row.in_loss, strict=True)
    found.loss_roles |= {message.role for message, in_loss in marked if in_loss}
    place = row.conversation.place
    roles = ["", *(message.role for message in messages), ""]
    for pair in pairwise(roles):
        found.followers.setdefault(pair, place)
    for message in messages:
        for name in message.fields:
            found.fields.setdefault((message.role, name), place)
    found.has_tools |= row.conversation.tools is not None
    found.has_images |= bool(row.conversation.images)
    found.has_fields |= any(message.fields for message in messages)
    found.is_plain &= all(not isinstance(message.content, tuple) for message in messages)
    found.template_arguments |= set(row.conversation.template_arguments)


def _add_shape(shape: set[tuple[str, str]], place: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _add_shape(shape, f"{place}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            _add_shape(shape, f"{place}[]", item)
    elif value is not None:
        shape.add((place, type(value).__name__))


def _turns(row: ExportRow) -> Iterator[Any]:
    for value in row.columns.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from value


def _add_turn(
    found: Survey, turn: Any, words: dict[str, str], pairs: Sequence[tuple[str, str]]
) -> None:
    pair = next((pair for pair in pairs if isinstance(turn, dict) and pair[0] in turn), None)
    if pair is None:
        return
    if found.words and found.turn_keys != pair:
        found.turn_keys = None
    elif not found.words:
        found.turn_keys = pair
    word = str(turn[pair[0]])
    found.words.setdefault(words.get(word, word), set()).add(word)
    found.other_keys |= {key for key, value in turn.items() if value is not None} - set(pair)
