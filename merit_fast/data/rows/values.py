"""Values of a row, checked one by one.

Every error names the place of the value, such as ``rows.jsonl:3: messages[0].role``.
"""

import json
from typing import Any

from merit_fast.errors import InputError, one_line, show


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


def read_json(value: Any, where: str) -> Any:
    """Returns what a string holds as JSON, and any other value as it is.

    Raises:
        InputError: the string is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    # an integer of thousands of digits, or endless nesting
    except (ValueError, RecursionError) as error:
        rule = f"must be JSON where it is a string ({one_line(error)})"
        raise InputError(f"{where}: {rule}, got {show(value)}") from None


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing that could be lost: null, or an empty string or collection."""
    return value is None or (not value and isinstance(value, str | list | dict))


def without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of an object that hold a value."""
    return {key: value for key, value in values.items() if value is not None}
