"""Columns that nothing reads: which may pass, and what a user can do about the others."""

from typing import Any

from merit_fast.errors import InputError, show

_ROW_NAMES = ("id", "idx", "index", "uid", "uuid", "source", "dataset")
_PANDAS_NAMES = ("__index_level_0__", "unnamed: 0")  # of an index in Parquet and in CSV
_MEDIA_NAMES = ("image", "img", "video", "audio", "media")
_PREFERENCE = (
    "a row of preferences has no single answer; columns: {completion: chosen}, or {messages: "
    "chosen} for whole conversations, with data.ignore_columns: [rejected] trains on the chosen one"
)
_LABEL = "columns: {keep_if: NAME} trains on the rows whose label is true and leaves the others out"
_TEXT = "a text without an answer of its own has nothing to train on; give it as two columns"
_MEDIA = "images are the only media that are read"
_HINTS = {
    "chosen": _PREFERENCE,
    "rejected": _PREFERENCE,
    "kto_tag": _LABEL.replace("NAME", "kto_tag"),
    "text": _TEXT,
    **dict.fromkeys(("video", "videos", "audio", "audios"), _MEDIA),
}


def names_row(column: str, value: Any) -> bool:
    """Whether a column only names its row or its origin, so that nothing is lost without it.

    Such are id, idx, index, uid, uuid, source, dataset and names that end in _id or _idx, if they
    hold a number or at most 200 characters on one line. Names of images, video and audio are not.
    """
    name = column.lower()
    is_media = name.startswith(_MEDIA_NAMES)  # the row asks about what such a name stands for
    is_name = name in (*_ROW_NAMES, *_PANDAS_NAMES) or (
        name.endswith(("_id", "_idx")) and not is_media
    )
    is_short = isinstance(value, int | float) or (
        isinstance(value, str) and len(value) <= 200 and "\n" not in value
    )
    return is_name and is_short


def hint_for(column: str, value: Any) -> str:
    """A remedy for a column that nothing reads, in brackets; "" where there is no special one."""
    hint = _HINTS.get(column, "")
    if column == "label" and isinstance(value, bool):
        hint = _LABEL.replace("NAME", "label")
    return f" ({hint})" if hint else ""


def unread_error(column: str, value: Any, dataset: str, place: str) -> InputError:
    """The error of a column that nothing reads."""
    rule = "must be named under columns or listed in data.ignore_columns, as nothing reads it"
    hint = hint_for(column, value)
    return InputError(
        f"{place}: column {column} of dataset {dataset}: {rule}, got {show(value)}{hint}"
    )
