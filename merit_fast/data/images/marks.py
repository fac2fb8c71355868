"""Marks that tell the images of conversations apart by content, for leaks and duplicates."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from merit_fast.data.conversation import Conversation, Image

_ENDS_BYTES = 4096


def rows_folder(media: str | None, place: str) -> Path:
    """The folder from which the paths of a row's images count.

    Args:
        media: the entry's ``media``; None: the folder of the rows.
        place: "file:line" of the row.
    """
    if media is not None:
        return Path(media).expanduser()
    return Path(place.rpartition(":")[0]).parent


def with_marks(conversation: Conversation, media: str | None) -> Conversation:
    """The conversation with a mark in place of each image, so that its key covers their contents.

    A mark is made of an image's size in bytes and of its first and last 4 KiB: equal images have
    equal marks, whatever their paths. An image that is not there keeps its path; the encoder
    refuses it.
    """
    if not conversation.images:
        return conversation
    folder = rows_folder(media, conversation.place)
    return replace(
        conversation, images=tuple(_marked(image, folder) for image in conversation.images)
    )


def _marked(image: Image, folder: Path) -> Image:
    if image.content is not None:
        content = image.content
        return Image(content=_mark(len(content), content[:_ENDS_BYTES], content[-_ENDS_BYTES:]))
    try:
        with open(folder / str(image.path), "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            first = file.read(_ENDS_BYTES)
            file.seek(max(0, num_bytes - _ENDS_BYTES))
            return Image(content=_mark(num_bytes, first, file.read(_ENDS_BYTES)))
    except (OSError, ValueError):  # no file, or a text that cannot name one
        return image


def _mark(num_bytes: int, first: bytes, last: bytes) -> bytes:
    return hashlib.sha256(b"%d\n" % num_bytes + first + last).digest()
