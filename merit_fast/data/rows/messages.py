"""Reads the messages of a row; each keeps every key that it came with."""

from collections.abc import Collection, Mapping
from typing import Any

from merit_fast.data.conversation import Message
from merit_fast.data.rows.calls import read_call_text, read_calls
from merit_fast.data.rows.parts import read_content
from merit_fast.data.rows.roles import CALL, read_role
from merit_fast.data.rows.values import is_empty, read_json, read_list
from merit_fast.errors import InputError, show

TURN_KEYS = (
    "role",
    "content",
    "train",
    "weight",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "name",
)


class MessageReader:
    """Reads messages with the keys and the words for roles of one dataset.

    Args:
        words: word in a row -> role.
        columns: key of ``TURN_KEYS`` -> the key that holds it in these rows, "" for none.
        ignored: keys of content parts that may be unread.
    """

    def __init__(
        self, words: Mapping[str, str], columns: Mapping[str, str], ignored: Collection[str] = ()
    ) -> None:
        self._words = words
        self._keys = {key: columns[key] for key in TURN_KEYS if key in columns}
        self._ignored = ignored

    def read_all(self, value: Any, where: str) -> list[Message]:
        """Reads a list of messages, or JSON text of one.

        Raises:
            InputError: no such list, or a message that ``read`` refuses.
        """
        messages = read_list(read_json(value, where), where)
        return [self.read(message, f"{where}[{i}]") for i, message in enumerate(messages)]

    def read(self, value: Any, where: str) -> Message:
        """Reads one message. Keys with a null count as absent, for Arrow fills in such keys.

        Raises:
            InputError: no object, an unknown role, content that is neither text nor parts, calls
                that are none, or a mark for the loss that is none.
        """
        if not isinstance(value, dict):
            raise InputError(f"{where}: must be an object with the key role, got {show(value)}")
        fields = {key: item for key, item in value.items() if item is not None}
        names = self._rename(fields, where) if self._keys else {}
        role_key = "role" if "role" in fields else "from"
        content_key = "content" if "content" in fields else "value"
        if role_key not in fields:
            role_name = names.get("role", "role")
            raise InputError(f"{where}: must have the key {role_name}, got {_list_keys(value)}")
        where_role = f"{where}.{names.get(role_key, role_key)}"
        role = read_role(fields.pop(role_key), self._words, where_role)
        content = fields.pop(content_key, None)
        where_content = f"{where}.{names.get(content_key, content_key)}"
        if role == CALL:
            role = "assistant"
            _refuse_calls(fields, where)
            content, fields["tool_calls"] = read_call_text(content, where_content)
        elif "tool_calls" in fields or "function_call" in fields:
            _read_call_keys(fields, where)
        if content is None and (role != "assistant" or "tool_calls" not in fields):
            content_name = names.get("content", "content")
            raise InputError(f"{where}: must have the key {content_name}, got {_list_keys(value)}")
        in_loss = None
        if "train" in fields or "weight" in fields:
            in_loss = _read_mark(fields, role, where)
        read = None if content is None else read_content(content, where_content, self._ignored)
        return Message(role, read, in_loss, fields)

    def _rename(self, fields: dict[str, Any], where: str) -> dict[str, str]:
        """Gives mapped keys their names in ``TURN_KEYS``; returns name -> key of the row.

        Raises:
            InputError: a key is both there and mapped to another one.
        """
        held = {key: fields.pop(own) for key, own in self._keys.items() if own in fields}
        for key, own in self._keys.items():
            if not own:
                fields.pop(key, None)
            elif not is_empty(fields.get(key)):
                rule = f"must be absent, as columns reads {own} in its place"
                raise InputError(f"{where}.{key}: {rule}, got {show(fields[key])}")
        fields.update(held)
        return {key: own for key, own in self._keys.items() if own}


def _refuse_calls(fields: Mapping[str, Any], where: str) -> None:
    for key in ("tool_calls", "function_call"):
        if not is_empty(fields.get(key)):
            rule = "must be absent where the content is a call"
            raise InputError(f"{where}.{key}: {rule}, got {show(fields[key])}")


def _read_call_keys(fields: dict[str, Any], where: str) -> None:
    """Replaces the calls in ``fields``, the older function_call too, by calls in one form."""
    older = fields.pop("function_call", None)
    calls = fields.pop("tool_calls", None)
    if not is_empty(older) and not is_empty(calls):
        rule = "must be absent next to tool_calls"
        raise InputError(f"{where}.function_call: {rule}, got {show(older)}")
    for key, value in (("function_call", older), ("tool_calls", calls)):
        if not is_empty(value):
            fields["tool_calls"] = read_calls(value, f"{where}.{key}")


def _read_mark(fields: dict[str, Any], role: str, where: str) -> bool | None:
    """Takes train and weight out of ``fields``; whether they put the message into the loss."""
    train = fields.pop("train", None)
    weight = fields.pop("weight", None)
    if train is not None and not isinstance(train, bool):
        raise InputError(f"{where}.train: must be true or false, got {show(train)}")
    if weight is None:
        return train
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InputError(f"{where}.weight: must be 0 or 1, got {show(weight)}")
    if weight and role != "assistant":
        rule = "must be 0 or absent except on an assistant's message"
        raise InputError(f"{where}.weight: {rule}, got {show(weight)}")
    if train is not None and train != bool(weight):
        raise InputError(f"{where}.weight: must agree with train: {train}, got {show(weight)}")
    return bool(weight)


def _list_keys(value: Mapping[str, Any]) -> str:
    return ", ".join(value) or "no keys"
