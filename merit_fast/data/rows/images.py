"""Images of a row: files, bytes, decoded images and data URLs, all as ``Image``."""

import base64
import binascii
import io
from typing import Any

from merit_fast.data.conversation import Image
from merit_fast.data.rows.values import without_nulls
from merit_fast.errors import InputError, show

_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")


def read_images(value: Any, where: str) -> list[Image]:
    """The images of a column: one, or a list of them; null and "" hold none.

    Raises:
        InputError: a value is no image, or lies in the network.
    """
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return [read_image(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return [read_image(value, where)]


def read_image(value: Any, where: str) -> Image:
    """An image: a path, a data URL, bytes, {bytes, path}, or a decoded image of Pillow.

    Raises:
        InputError: the value is none of these, or an address in the network.
    """
    if isinstance(value, str) and value:
        return _from_text(value, where)
    if isinstance(value, bytes) and value:
        return Image(content=value)
    if isinstance(value, dict) and not {*without_nulls(value)} - {"bytes", "path"}:
        if isinstance(value.get("bytes"), bytes):
            return read_image(value["bytes"], f"{where}.bytes")
        if isinstance(value.get("path"), str):
            return read_image(value["path"], f"{where}.path")
    if hasattr(value, "save") and hasattr(value, "mode"):
        return Image(content=_encoded(value))
    rule = "must be an image: a path, a data URL, bytes, or {bytes, path}"
    raise InputError(f"{where}: {rule}, got {show(value)}")


def decode_base64(text: Any, where: str) -> bytes:
    """The bytes that base64 text stands for. Raises InputError if it is not base64."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (AttributeError, binascii.Error, ValueError):
        raise InputError(f"{where}: must be base64, got {show(text)}") from None


def _from_text(text: str, where: str) -> Image:
    if text[:5].lower() == "data:":
        header, comma, content = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            rule = "must be data:TYPE;base64,CONTENT where it is a data URL"
            raise InputError(f"{where}: {rule}, got {show(text)}")
        return Image(content=decode_base64(content, where))
    if text.startswith("file://"):
        return Image(path=text.removeprefix("file://"))
    if "://" in text:
        rule = "must be a file or a data URL, as a run loads no image from the network"
        raise InputError(f"{where}: {rule}, got {show(text)}")
    return Image(path=text)


def _encoded(image: Any) -> bytes:
    """The bytes of a lossless file that holds a decoded image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if image.mode in _PNG_MODES else "TIFF")
    return buffer.getvalue()
