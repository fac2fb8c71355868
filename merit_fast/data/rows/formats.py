"""The formats of instruction rows. Each turns a row into one list of messages.

``FORMATS`` at the end of this file is the one table of them: a new format is one entry there and
one function that converts its rows. Error texts, the tables in the docs and the tests read it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merit_fast.data.conversation import Message
from merit_fast.data.rows.columns import COMMON, Column, Columns, Row, sources_of
from merit_fast.data.rows.messages import MessageReader
from merit_fast.data.rows.unread import hint_for
from merit_fast.data.rows.values import read_list, read_optional_string, read_string
from merit_fast.errors import InputError, show


@dataclass(frozen=True)
class Format:
    """One format of rows, recognised by its required columns."""

    name: str
    columns: tuple[Column, ...]
    description: str  # one line, as it stands in the docs
    example: Mapping[str, Any]
    convert: Callable[[Columns, MessageReader], list[Message]]

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the columns without which a row is of another format."""
        return tuple(column.name for column in self.columns if column.is_required)

    def sources(
        self, columns: Sequence[str], mapping: Mapping[str, str]
    ) -> dict[str, tuple[str, ...]] | None:
        """Name -> columns of a row that may hold it; None if the row is of another format."""
        sources = sources_of(columns, (*self.columns, *COMMON), mapping)
        return sources if all(name in sources for name in self.required) else None


def find_format(
    formats: Sequence[Format], row: Row, mapping: Mapping[str, str], where: str
) -> tuple[Format, dict[str, tuple[str, ...]]]:
    """Returns the first format whose required columns the row has, and the columns it reads.

    Raises:
        InputError: the columns fit no format.
    """
    columns = tuple(row)
    for candidate in formats:
        if (sources := candidate.sources(columns, mapping)) is not None:
            return candidate, sources
    accepted = "; ".join(
        ", ".join(mapping.get(name, name) for name in candidate.required) for candidate in formats
    )
    hint = next(filter(None, (hint_for(column, row[column]) for column in columns)), "")
    raise InputError(
        f"{where}: unknown columns: must have one of ({accepted}), "
        f"got {', '.join(columns) or 'none'}{hint}"
    )


def row_formats_markdown() -> str:
    """The table of all formats for the docs."""
    lines = ["| format | columns | rows | example |", "|---|---|---|---|"]
    for row_format in FORMATS:
        required = ", ".join(_cell(column) for column in row_format.columns if column.is_required)
        optional = ", ".join(
            _cell(column) for column in row_format.columns if not column.is_required
        )
        columns = f"{required}; optional {optional}" if optional else required
        example = json.dumps(row_format.example, ensure_ascii=False)
        lines.append(f"| {row_format.name} | {columns} | {row_format.description} | `{example}` |")
    return "\n".join(lines) + "\n"


def common_columns_markdown() -> str:
    """The table of the columns that rows of every format may have, for the docs."""
    lines = ["| column | holds |", "|---|---|"]
    lines += [f"| {_cell(column)} | {column.description} |" for column in COMMON]
    return "\n".join(lines) + "\n"


def _cell(column: Column) -> str:
    return " or ".join(f"`{name}`" for name in (column.name, *column.aliases))


def _from_messages(columns: Columns, reader: MessageReader) -> list[Message]:
    return reader.read_all(columns.get("messages"), columns.where("messages"))


def _from_sharegpt(columns: Columns, reader: MessageReader) -> list[Message]:
    return reader.read_all(columns.get("conversations"), columns.where("conversations"))


def _from_prompt_completion(columns: Columns, reader: MessageReader) -> list[Message]:
    prompt = _read_side(columns, reader, "prompt", "user")
    completion = _read_side(columns, reader, "completion", "assistant")
    first, repeated = prompt[0], completion[0]
    if (first.role, first.content) == (repeated.role, repeated.content):
        raise InputError(
            f"{columns.where('completion')}: must begin behind the prompt, but repeats its first "
            "message; a column of whole conversations is read with columns: {messages: NAME}"
        )
    # earlier answers of a prompt are history: the completion is the part that is trained
    history = [
        replace(message, in_loss=False)
        if message.role == "assistant" and message.in_loss is None
        else message
        for message in prompt
    ]
    return history + completion


def _read_side(columns: Columns, reader: MessageReader, name: str, role: str) -> list[Message]:
    value = columns.get(name)
    where = columns.where(name)
    if isinstance(value, str):
        return [Message(role, value)]
    if isinstance(value, list):
        return reader.read_all(value, where)
    if isinstance(value, dict):
        return [reader.read(value, where)]
    raise InputError(f"{where}: must be a string or a list of messages, got {show(value)}")


def _from_alpaca(columns: Columns, reader: MessageReader) -> list[Message]:
    where = columns.where
    messages = []
    history = columns.get("history") or []
    for i, pair in enumerate(read_list(history, where("history"), may_be_empty=True)):
        place = f"{where('history')}[{i}]"
        if not (isinstance(pair, list) and len(pair) == 2):
            raise InputError(f"{place}: must be a pair [question, answer], got {show(pair)}")
        question, answer = (read_string(text, place) for text in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    instruction = read_string(columns.get("instruction"), where("instruction"))
    context = read_optional_string(columns.get("input"), where("input"))
    lines = [text for text in (instruction, context) if text]
    messages.append(Message("user", "\n".join(lines)))
    output = read_string(columns.get("output"), where("output"))
    messages.append(Message("assistant", output))
    return messages


FORMATS = (  # the first whose required columns a row has is taken
    Format(
        name="messages",
        columns=(Column("messages", is_required=True),),
        description="a list of messages with role and content, as chat APIs take it",
        example={
            "messages": [
                {"role": "user", "content": "capital of France?"},
                {"role": "assistant", "content": "Paris"},
            ]
        },
        convert=_from_messages,
    ),
    Format(
        name="sharegpt",
        columns=(Column("conversations", ("conversation",), is_required=True),),
        description="a list of turns with from (human, gpt, system, ...) and value",
        example={
            "conversations": [
                {"from": "human", "value": "capital of France?"},
                {"from": "gpt", "value": "Paris"},
            ]
        },
        convert=_from_sharegpt,
    ),
    Format(
        name="alpaca",
        columns=(
            Column("instruction", is_required=True),
            Column("output", ("response",), is_required=True),
            Column("input", ("context",)),
            Column("history"),
        ),
        description="an instruction, its input on a line of its own, earlier pairs and the answer",
        example={"instruction": "capital of France?", "output": "Paris"},
        convert=_from_alpaca,
    ),
    Format(
        name="prompt and completion",
        columns=(
            Column("prompt", ("question", "query", "input", "inputs"), is_required=True),
            Column(
                "completion",
                ("response", "answer", "output", "targets"),
                is_required=True,
            ),
        ),
        description="two strings, or two lists of messages; only the completion is trained",
        example={"prompt": "capital of France?", "completion": "Paris"},
        convert=_from_prompt_completion,
    ),
)
