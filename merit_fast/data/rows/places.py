"""Gives the images of a row their places in its messages.

A place is an image part without an image, or the marker ``<image>`` in a text. Places take the
images of the row's column in their order. Where there is none, the images stand before the text of
the first user message. Places and images must agree in number.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from merit_fast.data.conversation import Image, Message, Part
from merit_fast.errors import InputError

IMAGE_MARKER = "<image>"
_MARKERS = {IMAGE_MARKER: "images", "<video>": "videos", "<audio>": "audios"}
MEDIA = tuple(_MARKERS.values())
_ANY_MARKER = re.compile("|".join(_MARKERS))


def place_images(
    messages: Sequence[Message], images: Sequence[Image], where: str
) -> tuple[tuple[Message, ...], tuple[Image, ...]]:
    """Turns markers into image parts, and gives every image part an image.

    Args:
        messages: the messages of a row; their image parts may hold an image.
        images: the images of the row's own column.
        where: the row's place, for error messages.

    Returns:
        The messages, and their images in the order of the parts that stand for them.

    Raises:
        InputError: places and images differ in number.
    """
    marked = [_with_parts(message, bool(images)) for message in messages]
    open_places = sum("image" not in part for part in _image_parts(marked))
    if images and not open_places:
        marked = _before_first_user(marked, len(images), where)
        open_places = len(images)
    if open_places != len(images):
        raise InputError(
            f"{where}: must have as many images as places for them ({IMAGE_MARKER} in a text, or "
            f"a part of the type image), got {len(images)} for {open_places}"
        )
    waiting = iter(images)
    placed = tuple(
        part["image"] if "image" in part else next(waiting) for part in _image_parts(marked)
    )
    return tuple(_without_images(message) for message in marked), placed


def refuse_markers(messages: Sequence[Message], unread: Sequence[str], where: str) -> None:
    """Checks that no message but an answer holds a marker for media that its row does not bring.

    Args:
        messages: the messages of a row without media.
        unread: kinds of media, such as images, that the entry says its rows do not have.
        where: the row's place, for error messages.

    Raises:
        InputError: a text holds a marker, so that the answer would be trained blind.
    """
    for i, message in enumerate(messages):
        text = message.content
        if message.role == "assistant" or not isinstance(text, str) or "<" not in text:
            continue
        for marker in _ANY_MARKER.findall(text):
            kind = _MARKERS[marker]
            if kind not in unread:
                raise InputError(
                    f"{where}: messages[{i}]: must come with {kind} where its text holds "
                    f"{marker}, found none; columns: {{{kind}: ''}} takes it for plain text"
                )


def _with_parts(message: Message, has_images: bool) -> Message:
    """The message with parts in place of markers, in answers only if the row brings images."""
    content = message.content
    if content is None or (message.role == "assistant" and not has_images):
        return message
    if isinstance(content, str):
        if IMAGE_MARKER not in content:
            return message
        return replace(message, content=tuple(_divided(content)))
    parts: list[Part] = []
    for part in content:
        parts += _divided(part["text"]) if part["type"] == "text" else [part]
    return replace(message, content=tuple(parts))


def _divided(text: str) -> Iterator[Part]:
    """The parts of a text with markers; its words stay as they are, line breaks included."""
    for i, words in enumerate(text.split(IMAGE_MARKER)):
        if i:
            yield {"type": "image"}
        if words:
            yield {"type": "text", "text": words}


def _before_first_user(messages: list[Message], count: int, where: str) -> list[Message]:
    for i, message in enumerate(messages):
        if message.role == "user":
            content = message.content
            parts = _divided(content) if isinstance(content, str) else content or ()
            first = replace(message, content=({"type": "image"},) * count + tuple(parts))
            return [*messages[:i], first, *messages[i + 1 :]]
    raise InputError(f"{where}: must have a user message for its images, found none")


def _image_parts(messages: Sequence[Message]) -> Iterator[Any]:
    for message in messages:
        if isinstance(message.content, tuple):
            yield from (part for part in message.content if part["type"] == "image")


def _without_images(message: Message) -> Message:
    if not isinstance(message.content, tuple):
        return message
    parts = [{"type": "image"} if part["type"] == "image" else part for part in message.content]
    return replace(message, content=tuple(parts))
