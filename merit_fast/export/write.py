"""Writes files of exported rows: each row's own text, and columns behind it."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merit_fast.data.conversation import Image
from merit_fast.errors import InputError, show
from merit_fast.export.form import Form, Names
from merit_fast.export.messages import ImageFiles
from merit_fast.export.rows import ExportRow, PartRows


def write_rows(
    file: Path, members: Iterable[tuple[PartRows, Form]], names: Names, image_folder: Path
) -> int:
    """Writes the rows of several datasets; returns their number.

        {ROW AS IT CAME, "dataset": NAME, "id": "NAME-NUMBER", further columns of the form}

    Args:
        file: the JSONL file.
        members: the rows, and how the stack reads them.
        names: names of the added columns.
        image_folder: path under which rows name the images that they held as bytes; the files
            are written to the folder of that name next to ``file``.

    Raises:
        InputError: a row cannot be read, or holds a value that JSON cannot.
    """
    count = 0
    written = file.parent / image_folder.name
    with open(file, "wb") as stream:
        for rows, form in members:
            images = ImageFiles(rows.config.media, written, image_folder)
            for row in rows:
                added = {names.dataset: row.dataset, names.id: f"{row.dataset}-{row.number}"}
                if form.extra is not None:
                    added |= form.extra(row, images)
                own = row_text(row, images) if form.keeps_columns else b"{}"
                stream.write(joined(own, added) + b"\n")
                count += 1
    return count


def joined(text: bytes, added: dict[str, Any]) -> bytes:
    """The JSON text of an object, byte for byte, with further keys before its closing brace."""
    assert text.endswith(b"}") and added
    if text == b"{}":
        return _encoded(added)
    return text[:-1] + b", " + _encoded(added)[1:]


def _encoded(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 does not have
        return json.dumps(value).encode("ascii")


def row_text(row: ExportRow, images: ImageFiles) -> bytes:
    """The row's own JSON text, or its columns as JSON."""
    if isinstance(row.raw, bytes):
        return row.raw
    return _encoded({column: _plain(value, row, images) for column, value in row.raw.items()})


def _plain(value: Any, row: ExportRow, images: ImageFiles) -> Any:
    """The value as JSON has it.

    Images become paths of files; times and decimal numbers become texts; NaN and infinities, which
    JSON does not have, become null.
    """
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return images(Image(content=value["bytes"]))
        return {key: _plain(item, row, images) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, row, images) for item in value]
    if isinstance(value, bytes):
        return images(Image(content=value))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | uuid.UUID):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    place = row.conversation.place
    raise InputError(f"{place}: must hold values that JSON has, got {show(value)}")
