"""Content of a message: a string, or parts of text and images in their order."""

from collections.abc import Collection
from typing import Any

from merit_fast.data.conversation import Image, Part
from merit_fast.data.rows.images import decode_base64, read_image
from merit_fast.data.rows.values import read_field, read_string, without_nulls
from merit_fast.errors import InputError, show

Content = str | tuple[Part, ...]

_SOURCES = ("image", "path", "url", "bytes", "image_url", "base64")


def read_content(value: Any, where: str, ignored: Collection[str]) -> Content:
    """Reads content. Parts that are all text are joined to a string.

    An image part that brings its image holds it under "image", as ``Image``; ``places`` takes it
    out. One without waits for an image of the row.

    Args:
        value: a string, or a list of parts {"type": "text" | "image" | "image_url", ...}.
        where: the place, for error messages.
        ignored: keys of parts that may be unread.

    Raises:
        InputError: a part is neither text nor an image, or has a key that nothing reads.
    """
    if not isinstance(value, list):
        return read_string(value, where)
    parts = [_read_part(part, f"{where}[{i}]", ignored) for i, part in enumerate(value)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return tuple(parts)


def _read_part(value: Any, where: str, ignored: Collection[str]) -> dict[str, Any]:
    kind = read_field(value, "type", where)
    part = without_nulls(value)
    del part["type"]
    read: dict[str, Any] = {"type": "text" if kind == "text" else "image"}
    if kind == "text":
        read["text"] = read_string(read_field(part, "text", where), f"{where}.text")
        del part["text"]
    elif kind in ("image", "image_url"):
        found = [key for key in _SOURCES if key in part]
        if len(found) > 1:
            raise InputError(f"{where}: must name one image, got {', '.join(found)}")
        for key in found:
            read["image"] = _read_source(key, part.pop(key), f"{where}.{key}", ignored)
    else:
        rule = "must be text, image or image_url"
        raise InputError(f"{where}.type: {rule}, got {show(kind)}")
    for key, item in part.items():
        if key in ("train", "weight"):
            rule = "must be absent: a part has no mark for the loss, its message has"
            raise InputError(f"{where}.{key}: {rule}, got {show(item)}")
        _refuse_key(key, item, where, ignored)
    return read


def _read_source(key: str, value: Any, where: str, ignored: Collection[str]) -> Image:
    if key == "base64" and not str(value).startswith("data:"):
        return Image(content=decode_base64(value, where))
    if key == "image_url" and isinstance(value, dict):
        for other, item in without_nulls(value).items():
            if other != "url":
                _refuse_key(other, item, where, ignored)
        return read_image(read_field(value, "url", where), f"{where}.url")
    return read_image(value, where)


def _refuse_key(key: str, value: Any, where: str, ignored: Collection[str]) -> None:
    if key not in ignored:
        rule = "must be absent or listed under data.ignore_columns, as nothing reads it"
        raise InputError(f"{where}.{key}: {rule}, got {show(value)}")
