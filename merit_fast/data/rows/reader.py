"""Reads the rows of one dataset, all of one format, as conversations."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig, TrainOn
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.rows.calls import read_tools
from merit_fast.data.rows.columns import COMMON, Columns
from merit_fast.data.rows.formats import FORMATS, Format, find_format
from merit_fast.data.rows.images import read_images
from merit_fast.data.rows.loss import messages_in_loss, train_on_of
from merit_fast.data.rows.messages import TURN_KEYS, MessageReader
from merit_fast.data.rows.places import MEDIA, place_images, refuse_markers
from merit_fast.data.rows.roles import ROLES, role_words
from merit_fast.data.rows.unread import names_row, unread_error
from merit_fast.data.rows.values import is_empty, read_json, without_nulls
from merit_fast.errors import InputError, show

_REFUSED_MEDIA = tuple(kind for kind in MEDIA if kind != "images")


class LeftOutRow(InputError):
    """A row that says of itself that it is not to be trained on."""


class RowReader:
    """The format of a dataset's rows, found at its first row, and counts for its notes.

    Args:
        config: the dataset's entry.
        data_config: the `data:` section.

    Raises:
        InputError: ``columns``, ``roles`` or ``train_on`` cannot hold for any row.
    """

    def __init__(self, config: DatasetConfig, data_config: DataConfig) -> None:
        self.config = config
        self.data_config = data_config
        self._where = f"mixture: {config.name}"
        self._mapping = config.columns or {}
        self._formats = _formats_for(self._mapping, self._where)
        words = role_words(config.roles, self._where)
        self._messages = MessageReader(words, self._mapping, data_config.ignore_columns)
        self._train_on = train_on_of(config, data_config)
        _check_roles(self._train_on, {*words.values()}, self._where)
        unread = {name for name, own in self._mapping.items() if not own}
        self._no_media = tuple(unread & {*MEDIA})
        self._ignored = {
            *data_config.ignore_columns,
            *(column for name in unread - {*_REFUSED_MEDIA} for column in _names_of(name)),
        }
        self._format: Format | None = None
        self._layouts: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
        self._missing = {own for own in self._mapping.values() if own}
        self._names: set[str] = set()
        self._counts: Counter[str] = Counter()

    @property
    def format_name(self) -> str:
        """The name of the rows' format; "" before the first row."""
        return self._format.name if self._format else ""

    def read(self, row: dict[str, Any], place: str) -> Conversation:
        """Converts one row. Nothing of it is dropped, but for what the entry says.

        Raises:
            LeftOutRow: the row's column of ``keep_if`` is false.
            InputError: the row is of no known format, of another than those before it, broken,
                without a message in the loss, or holds something that nothing reads.
        """
        row_format, sources = self._layout(row, place)
        columns = Columns(row, sources, place)
        self._check_unread(columns, row)
        if "keep_if" in sources:
            self._check_kept(columns)
        messages = row_format.convert(columns, self._messages)
        if not is_empty(columns.get("system")):
            messages = self._with_system(messages, columns)
        placed, images = self._place_images(messages, columns, row)
        conversation = Conversation(
            place,
            placed,
            read_tools(columns.get("tools"), columns.where("tools")),
            _template_arguments(columns),
            images,
        )
        self._check_loss(conversation)
        return conversation

    def notes(self) -> list[str]:
        """One sentence on each thing that a user should know about the rows read so far."""
        notes = []
        if self._names:
            notes.append(f"columns not used: {', '.join(sorted(self._names))}")
        if self._format and self._missing:
            notes.append(f"columns that no row has: {', '.join(sorted(self._missing))}")
        for sentence, count in self._counts.items():
            notes.append(f"{count} {'row' if count == 1 else 'rows'} {sentence}")
        return notes

    def _layout(self, row: dict[str, Any], place: str) -> tuple[Format, dict[str, tuple[str, ...]]]:
        """The format of a row and the columns that it reads, kept for rows of these columns."""
        names = tuple(row)
        if self._format is not None and names in self._layouts:
            return self._format, self._layouts[names]
        row_format, sources = find_format(self._formats, row, self._mapping, place)
        if self._format is not None and row_format is not self._format:
            raise InputError(
                f"{place}: must be of the kind of the rows before it ({self._format.name}: "
                f"{', '.join(self._format.required)}), got {', '.join(row)}"
            )
        self._format = row_format
        self._layouts[names] = sources
        self._missing -= self._turn_columns() | set(names)
        return row_format, sources

    def _turn_columns(self) -> set[str]:
        return {own for name, own in self._mapping.items() if name in TURN_KEYS}

    def _check_unread(self, columns: Columns, row: dict[str, Any]) -> None:
        for column in columns.unread():
            if column in self._ignored:
                continue
            if not names_row(column, row[column]):
                raise unread_error(column, row[column], self.config.name, columns.place)
            self._names.add(column)

    def _check_kept(self, columns: Columns) -> None:
        value = columns.get("keep_if")
        if not isinstance(value, bool):
            rule = "must be true or false, as columns: keep_if reads it"
            raise InputError(f"{columns.where('keep_if')}: {rule}, got {show(value)}")
        if not value:
            column = columns.column("keep_if")
            self._counts[f"left out, as {column} is false"] += 1
            raise LeftOutRow(f"{columns.where('keep_if')}: must be true, got False")

    def _with_system(self, messages: list[Message], columns: Columns) -> list[Message]:
        value = columns.get("system")
        if not isinstance(value, str):
            raise InputError(f"{columns.where('system')}: must be a string, got {show(value)}")
        if messages[0].role != "system":
            return [Message("system", value), *messages]
        if messages[0].content != value:
            column = columns.column("system")
            self._counts[f"with a system message, which wins over the column {column}"] += 1
        return messages

    def _place_images(
        self, messages: list[Message], columns: Columns, row: dict[str, Any]
    ) -> tuple[tuple[Message, ...], Any]:
        images = read_images(columns.get("images"), columns.where("images"))
        if images or any(isinstance(message.content, tuple) for message in messages):
            return place_images(messages, images, columns.place)
        hidden = any(not is_empty(row.get(name)) for name in _names_of("images"))
        refuse_markers(messages, () if hidden else self._no_media, columns.place)
        return tuple(messages), ()

    def _check_loss(self, conversation: Conversation) -> None:
        if any(messages_in_loss(conversation, self._train_on)):
            return
        if all(message.role != "assistant" for message in conversation.messages):
            rule = "must have an answer of the assistant"
        else:
            rule = "must have a message in the loss, by train_on or its own mark"
        raise InputError(f"{conversation.place}: {rule}, found none")


@functools.cache
def _names_of(name: str) -> tuple[str, ...]:
    """A column's name and its aliases in every format."""
    known = [column for row_format in FORMATS for column in row_format.columns]
    aliases = [alias for c in (*known, *COMMON) if c.name == name for alias in c.aliases]
    return (name, *aliases)


def _formats_for(mapping: Mapping[str, str], where: str) -> tuple[Format, ...]:
    """The formats that read every column that an entry's ``columns`` names.

    Raises:
        InputError: a name that nothing reads, or names of no one format.
    """
    everywhere = {*(column.name for column in COMMON), *TURN_KEYS}
    known = {column.name for row_format in FORMATS for column in row_format.columns}
    for name, own in mapping.items():
        if name not in everywhere | known and not (name in _REFUSED_MEDIA and not own):
            names = ", ".join(sorted(everywhere | known))
            raise InputError(f"{where}: columns: must name columns among {names}, got {name!r}")
    counts = Counter((name in TURN_KEYS, own) for name, own in mapping.items() if own)
    for (_, own), count in counts.items():
        if count > 1:
            rule = "must read each column once"
            raise InputError(f"{where}: columns: {rule}, got {own!r} {count} times")
    own_names = set(mapping) - everywhere - {*_REFUSED_MEDIA}
    formats = tuple(f for f in FORMATS if own_names <= {column.name for column in f.columns})
    if not formats:
        rule = "must name columns of one format"
        raise InputError(f"{where}: columns: {rule}, got {', '.join(sorted(own_names))}")
    return formats


def _check_roles(train_on: TrainOn, known: set[str], where: str) -> None:
    if isinstance(train_on, tuple):
        for role in train_on:
            if role not in {*ROLES, *known}:
                rule = f"must be all, last or roles among {', '.join(sorted({*ROLES, *known}))}"
                raise InputError(f"{where}: train_on: {rule}, got {role!r}")


def _template_arguments(columns: Columns) -> dict[str, Any]:
    where = columns.where("chat_template_kwargs")
    value = read_json(columns.get("chat_template_kwargs") or None, where)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: must be an object, got {show(value)}")
    arguments = {} if value is None else without_nulls(value)
    parallel = columns.get("parallel_tool_calls")
    return arguments if parallel is None else {"parallel_tool_calls": parallel, **arguments}
