"""Turns the texts of conversations with images into the texts that a model reads, and back again:
placeholders become the tokens of images, examples get their media.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merit_fast.data.config import DataConfig
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.dataset import Example
from merit_fast.data.images.files import ImageFile, find_image
from merit_fast.data.images.layout import image_layout
from merit_fast.data.images.media import place_images
from merit_fast.data.template import Rendered
from merit_fast.errors import InputError


@dataclass(frozen=True)
class TextWithImages:
    """A text in which the tokens of images stand, and the images in their order."""

    rendered: Rendered
    files: tuple[ImageFile, ...]


class ImageEncoder:
    """The images of one dataset's rows, for a model that reads images.

    Rows without images take the same way: their examples have media without pixels.

    Args:
        processor: the model's processor.
        data_config: the `data:` section.
        media: the entry's folder of images; None: paths count from the folder of the rows.
    """

    def __init__(self, processor: Any, data_config: DataConfig, media: str | None = None) -> None:
        self.layout = image_layout(processor)
        self._data_config = data_config
        self._media = media

    def find(self, conversation: Conversation) -> tuple[ImageFile, ...]:
        """Finds and checks the images of a row that its text shows, in their order.

        Raises:
            InputError: an image is missing, broken or too large, the parts that stand for images
                are more or fewer than the images, or a text spells the tokens of an image.
        """
        place = conversation.place
        found = sum(_num_images(message) for message in conversation.messages)
        if found != len(conversation.images):
            rule = f"must have as many places for images as images ({len(conversation.images)})"
            raise InputError(f"{place}: {rule}, got {found}")
        for i, message in enumerate(conversation.messages):
            self._check_message(message, f"{place}: messages[{i}]")
        folder = self._folder(place)
        files = []
        for i, image in enumerate(conversation.images[: _num_shown(conversation)]):
            where = f"{place}: images[{i}]"
            file = find_image(image, where, folder)
            self._refuse_too_long(file, where)
            files.append(file)
        return tuple(files)

    def expand(
        self, rendered: Sequence[Rendered], files: Sequence[ImageFile]
    ) -> list[TextWithImages]:
        """Replaces the placeholder of each image by the text of its tokens.

        Args:
            rendered: the texts of one row. Each shows the row's images up to its last answer.
            files: the images of the row.

        Raises:
            InputError: a text holds another number of placeholders than images.
        """
        return [
            self._expand(text, files, i == len(rendered) - 1) for i, text in enumerate(rendered)
        ]

    def attach(self, example: Example, text: TextWithImages) -> Example:
        """The example with its media; no token of an image is a target.

        Raises:
            InputError: the tokens hold more or fewer image tokens than the images demand.
        """
        try:
            media = place_images(text.files, example.input_ids, self.layout)
        except InputError as error:
            raise InputError(f"{text.rendered.where}: {error}") from None
        if (example.labels[media.token_types > 0] >= 0).any():
            raise InputError(f"{text.rendered.where}: an answer must not hold an image")
        return replace(example, media=media)

    def _folder(self, place: str) -> Path:
        if self._media is not None:
            return Path(self._media).expanduser()
        return Path(place.rpartition(":")[0]).parent

    def _check_message(self, message: Message, where: str) -> None:
        if message.role == "assistant" and _num_images(message):
            raise InputError(f"{where}: an answer must not hold an image")
        for token in (self.layout.placeholder, *self.layout.token_texts):
            if any(token in text for text in _texts(message)):
                raise InputError(f"{where}: text must not spell {token}, which stands for an image")

    def _refuse_too_long(self, file: ImageFile, where: str) -> None:
        try:
            num_tokens = self.layout.num_tokens(file.size)
        except InputError as error:
            raise InputError(f"{where}: {file.name}: {error}") from None
        limit = self._data_config.max_length
        if num_tokens >= limit and self._data_config.too_long != "drop":
            shape = f"{file.size[0]} x {file.size[1]} pixels"
            rule = f"must have fewer than data.max_length = {limit} tokens"
            raise InputError(f"{where}: {rule}, got {num_tokens} ({shape})")

    def _expand(self, text: Rendered, files: Sequence[ImageFile], is_whole: bool) -> TextWithImages:
        token = self.layout.placeholder
        pieces = text.text.split(token)
        count = len(pieces) - 1
        if count > len(files) or (is_whole and count < len(files)):
            rule = f"the chat template must write {token} for each of {len(files)} images"
            raise InputError(f"{text.where}: {rule}, got {count}")
        shown = tuple(files[:count])
        parts = [pieces[0]]
        moves = []  # where a placeholder ends in the old text, and the characters that it gained
        position = len(pieces[0])
        for file, piece in zip(shown, pieces[1:], strict=True):
            replacement = self.layout.replacement(file.size)
            position += len(token)
            moves.append((position, len(replacement) - len(token)))
            position += len(piece)
            parts += [replacement, piece]
        spans = tuple((_moved(first, moves), _moved(past, moves)) for first, past in text.spans)
        return TextWithImages(replace(text, text="".join(parts), spans=spans), shown)


def _moved(position: int, moves: Sequence[tuple[int, int]]) -> int:
    return position + sum(gained for end, gained in moves if end <= position)


def _num_shown(conversation: Conversation) -> int:
    """Images up to the last answer; the text ends there."""
    messages = conversation.messages
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    return sum(_num_images(message) for message in messages[: max(answers, default=-1) + 1])


def _num_images(message: Message) -> int:
    if not isinstance(message.content, tuple):
        return 0
    return sum(part.get("type") == "image" for part in message.content)


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [str(part.get("text", "")) for part in message.content or ()]
