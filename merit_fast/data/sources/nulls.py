"""Takes out the nulls that Arrow fills into the structs of a row."""

from typing import Any


def without_filled_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row without keys that are null inside its columns, at every depth.

    All structs of an Arrow column have one set of keys: what only some rows hold is null in the
    others. Columns themselves, and nulls in lists, stay.
    """
    return {
        column: _cleaned(value) if isinstance(value, dict | list) else value
        for column, value in row.items()
    }


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return value
