"""The formats of instruction rows. Each turns a row into one list of messages.

``FORMATS`` at the end of this file is the one table of them: a new format is one entry there and
one function that converts its rows. Error texts, the table in the docs and the tests read it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merit_fast.data.rows.messages import (
    Message,
    read_field,
    read_list,
    read_messages,
    read_optional_string,
    read_string,
)
from merit_fast.errors import InputError, show

Row = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Format:
    """One format of rows, recognised by its required columns."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    description: str  # one line, as it stands in the docs
    example: Mapping[str, Any]
    convert: Callable[[Row, str], list[Message]]  # the row and its place, for error messages

    def matches(self, row: Row) -> bool:
        """Whether the row has every required column."""
        return all(column in row for column in self.required)

    def unused_columns(self, row: Row) -> set[str]:
        """Columns that hold a value but are not read by this format."""
        filled = {column for column, value in row.items() if value is not None}
        return filled - {*self.required, *self.optional}


def find_format(row: Row, where: str) -> Format:
    """Returns the first of FORMATS whose required columns the row has.

    Raises:
        InputError: the columns fit no format.
    """
    for candidate in FORMATS:
        if candidate.matches(row):
            return candidate
    accepted = "; ".join(", ".join(candidate.required) for candidate in FORMATS)
    columns = ", ".join(row) or "none"
    raise InputError(f"{where}: unknown columns: must have one of ({accepted}), got {columns}")


def row_formats_markdown() -> str:
    """The table of all formats for the docs."""
    lines = ["| format | columns | rows | example |", "|---|---|---|---|"]
    for row_format in FORMATS:
        columns = ", ".join(f"`{column}`" for column in row_format.required)
        if row_format.optional:
            columns += f"; optional {', '.join(f'`{column}`' for column in row_format.optional)}"
        example = json.dumps(row_format.example, ensure_ascii=False)
        lines.append(f"| {row_format.name} | {columns} | {row_format.description} | `{example}` |")
    return "\n".join(lines) + "\n"


def _from_messages(row: Row, where: str) -> list[Message]:
    return read_messages(row["messages"], f"{where}: messages")


def _from_sharegpt(row: Row, where: str) -> list[Message]:
    where = f"{where}: conversations"
    messages = []
    for i, turn in enumerate(read_list(row["conversations"], where)):
        speaker = read_field(turn, "from", f"{where}[{i}]")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            roles = ", ".join(_SHAREGPT_ROLES)
            raise InputError(f"{where}[{i}].from: must be one of {roles}, got {show(speaker)}")
        value = read_string(read_field(turn, "value", f"{where}[{i}]"), f"{where}[{i}].value")
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": value})
    return messages


def _from_prompt_completion(row: Row, where: str) -> list[Message]:
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column]
        if isinstance(value, str):
            messages.append({"role": role, "content": value})
        elif isinstance(value, list):
            messages.extend(read_messages(value, f"{where}: {column}"))
        else:
            raise InputError(
                f"{where}: {column}: must be a string or a list of messages, got {show(value)}"
            )
    return messages


def _from_alpaca(row: Row, where: str) -> list[Message]:
    system = read_optional_string(row.get("system"), f"{where}: system")
    context = read_optional_string(row.get("input"), f"{where}: input")
    messages = [{"role": "system", "content": system}] if system else []
    history = [] if row.get("history") is None else row["history"]
    for i, pair in enumerate(read_list(history, f"{where}: history", may_be_empty=True)):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise InputError(
                f"{where}: history[{i}]: must be a pair [question, answer], got {show(pair)}"
            )
        question, answer = (read_string(text, f"{where}: history[{i}]") for text in pair)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    instruction = read_string(row["instruction"], f"{where}: instruction")
    question = f"{instruction}\n{context}" if context else instruction
    messages.append({"role": "user", "content": question})
    output = read_string(row["output"], f"{where}: output")
    messages.append({"role": "assistant", "content": output})
    return messages


FORMATS = (  # the first whose required columns a row has is taken
    Format(
        name="messages",
        required=("messages",),
        optional=(),
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
        required=("conversations",),
        optional=(),
        description="a list of turns with from (human, gpt, system) and value",
        example={
            "conversations": [
                {"from": "human", "value": "capital of France?"},
                {"from": "gpt", "value": "Paris"},
            ]
        },
        convert=_from_sharegpt,
    ),
    Format(
        name="prompt and completion",
        required=("prompt", "completion"),
        optional=(),
        description="two strings, or two lists of messages",
        example={"prompt": "capital of France?", "completion": "Paris"},
        convert=_from_prompt_completion,
    ),
    Format(
        name="alpaca",
        required=("instruction", "output"),
        optional=("input", "system", "history"),
        description="an instruction, its input on a line of its own, earlier pairs and the answer",
        example={"instruction": "capital of France?", "output": "Paris"},
        convert=_from_alpaca,
    ),
)
