"""Lists of chat messages as they stand in a row, checked value by value.

Every error names the place of the value, such as ``rows.jsonl:3: messages[0].role``.
"""

from typing import Any

from merit_fast.errors import InputError, show

Message = dict[str, str]  # role, content

ROLES = ("system", "user", "assistant", "tool")
_CALLS = ("tool_calls", "function_call")


def read_messages(value: Any, where: str) -> list[Message]:
    """Checks a list of objects with role and content.

    Raises:
        InputError: no such list, an unknown role, a call of a tool, or content that is not text.
    """
    messages = []
    for i, message in enumerate(read_list(value, where)):
        role = read_field(message, "role", f"{where}[{i}]")
        if role not in ROLES:
            raise InputError(
                f"{where}[{i}].role: must be one of {', '.join(ROLES)}, got {show(role)}"
            )
        for key in _CALLS:
            if message.get(key):
                raise InputError(
                    f"{where}[{i}].{key}: must be absent; write the call into content instead"
                )
        content = read_field(message, "content", f"{where}[{i}]")
        messages.append({"role": role, "content": _read_content(content, f"{where}[{i}].content")})
    return messages


def read_list(value: Any, where: str, may_be_empty: bool = False) -> list[Any]:
    """Returns ``value`` if it is a list. Raises InputError otherwise."""
    if not isinstance(value, list) or not (value or may_be_empty):
        raise InputError(
            f"{where}: must be a {'' if may_be_empty else 'non-empty '}list, got {show(value)}"
        )
    return value


def read_field(value: Any, key: str, where: str) -> Any:
    """Returns ``value[key]``. Raises InputError if ``value`` is no object or lacks the key."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object with the key {key}, got {show(value)}")
    if value.get(key) is None:
        raise InputError(f"{where}: must have the key {key}, got {', '.join(value) or 'no keys'}")
    return value[key]


def read_string(value: Any, where: str) -> str:
    """Returns ``value`` if it is a string. Raises InputError otherwise."""
    if not isinstance(value, str):
        raise InputError(f"{where}: must be a string, got {show(value)}")
    return value


def read_optional_string(value: Any, where: str) -> str:
    """Returns ``value``, or "" for None. Raises InputError for anything but a string."""
    return "" if value is None else read_string(value, where)


def _read_content(value: Any, where: str) -> str:
    """Returns a string, or joins a list of text parts."""
    if not isinstance(value, list):
        return read_string(value, where)
    texts = []
    for i, item in enumerate(value):
        kind = read_field(item, "type", f"{where}[{i}]")
        if kind != "text":
            raise InputError(f"{where}[{i}].type: must be text, got {show(kind)}")
        text = read_field(item, "text", f"{where}[{i}]")
        texts.append(read_string(text, f"{where}[{i}].text"))
    return "".join(texts)
