"""The four shapes of instruction rows, told apart by their columns, all turned into one list of messages."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merit_fast.errors import InputError, show

Message = dict[str, str]  # role, content

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Format:
    """How rows with these columns become messages. ``convert`` takes the row and its place."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[dict[str, Any], str], list[Message]]

    def unused_columns(self, row: dict[str, Any]) -> set[str]:
        """Columns with a value that the format does not read."""
        return {column for column, value in row.items() if value is not None} - {
            *self.required,
            *self.optional,
        }


def find_format(row: dict[str, Any], where: str) -> Format:
    """The first of FORMATS whose required columns the row has.

    Raises:
        InputError: none fits.
    """
    for candidate in FORMATS:
        if all(column in row for column in candidate.required):
            return candidate
    accepted = "; ".join(", ".join(candidate.required) for candidate in FORMATS)
    raise InputError(
        f"{where}: unknown columns: must have one of ({accepted}), got {', '.join(row) or 'none'}"
    )


def _from_messages(row: dict[str, Any], where: str) -> list[Message]:
    return _messages(row["messages"], f"{where}: messages")


def _from_sharegpt(row: dict[str, Any], where: str) -> list[Message]:
    where = f"{where}: conversations"
    messages = []
    for i, turn in enumerate(_list(row["conversations"], where)):
        speaker = _field(turn, "from", f"{where}[{i}]")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            roles = ", ".join(_SHAREGPT_ROLES)
            raise InputError(f"{where}[{i}].from: must be one of {roles}, got {show(speaker)}")
        value = _string(_field(turn, "value", f"{where}[{i}]"), f"{where}[{i}].value")
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": value})
    return messages


def _from_prompt_completion(row: dict[str, Any], where: str) -> list[Message]:
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row[column]
        if isinstance(value, str):
            messages.append({"role": role, "content": value})
        elif isinstance(value, list):
            messages.extend(_messages(value, f"{where}: {column}"))
        else:
            raise InputError(
                f"{where}: {column}: must be a string or a list of messages, got {show(value)}"
            )
    return messages


def _from_alpaca(row: dict[str, Any], where: str) -> list[Message]:
    system, context = (_optional_string(row.get(c), f"{where}: {c}") for c in ("system", "input"))
    messages = [{"role": "system", "content": system}] if system else []
    history = [] if row.get("history") is None else row["history"]
    for i, pair in enumerate(_list(history, f"{where}: history", may_be_empty=True)):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise InputError(
                f"{where}: history[{i}]: must be a pair [question, answer], got {show(pair)}"
            )
        question, answer = (_string(text, f"{where}: history[{i}]") for text in pair)
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    instruction = _string(row["instruction"], f"{where}: instruction")
    question = f"{instruction}\n{context}" if context else instruction
    answer = _string(row["output"], f"{where}: output")
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


FORMATS = (
    Format("messages", ("messages",), (), _from_messages),
    Format("sharegpt", ("conversations",), (), _from_sharegpt),
    Format("prompt and completion", ("prompt", "completion"), (), _from_prompt_completion),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history"), _from_alpaca),
)


def _messages(value: Any, where: str) -> list[Message]:
    messages = []
    for i, message in enumerate(_list(value, where)):
        role = _field(message, "role", f"{where}[{i}]")
        if role not in ROLES:
            raise InputError(
                f"{where}[{i}].role: must be one of {', '.join(ROLES)}, got {show(role)}"
            )
        for key in _CALLS:
            if message.get(key):
                raise InputError(
                    f"{where}[{i}].{key}: must be absent; write the call into content instead"
                )
        content = _content(_field(message, "content", f"{where}[{i}]"), f"{where}[{i}].content")
        messages.append({"role": role, "content": content})
    return messages


def _content(value: Any, where: str) -> str:
    """A string, or a list of text parts, joined."""
    if not isinstance(value, list):
        return _string(value, where)
    texts = []
    for i, part in enumerate(value):
        kind = _field(part, "type", f"{where}[{i}]")
        if kind != "text":
            raise InputError(f"{where}[{i}].type: must be text, got {show(kind)}")
        texts.append(_string(_field(part, "text", f"{where}[{i}]"), f"{where}[{i}].text"))
    return "".join(texts)


def _list(value: Any, where: str, may_be_empty: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or may_be_empty):
        raise InputError(
            f"{where}: must be a {'' if may_be_empty else 'non-empty '}list, got {show(value)}"
        )
    return value


def _field(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object with the key {key}, got {show(value)}")
    if value.get(key) is None:
        raise InputError(f"{where}: must have the key {key}, got {', '.join(value) or 'no keys'}")
    return value[key]


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: must be a string, got {show(value)}")
    return value


def _optional_string(value: Any, where: str) -> str:
    return "" if value is None else _string(value, where)
