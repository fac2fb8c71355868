"""Encodes conversations with images: as ``ChatEncoder`` does, with placeholders replaced."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merit_fast.data.config import DataConfig, TrainOn
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.dataset import Example
from merit_fast.data.images.files import ImageFile, find_image
from merit_fast.data.images.layout import image_layout
from merit_fast.data.images.marks import rows_folder
from merit_fast.data.images.media import ImageMedia, place_images
from merit_fast.data.rows.loss import messages_in_loss
from merit_fast.data.template import (
    ChatEncoder,
    Encoded,
    Rendered,
    TextTokenizer,
    fit,
    label,
)
from merit_fast.errors import InputError

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shown:
    """The images that the texts of a row show.

    Attributes:
        files: the images up to the last trained turn, in their order.
        counts: numbers of images up to each trained turn.
    """

    files: tuple[ImageFile, ...]
    counts: tuple[int, ...]


class ImageEncoder:
    """The encoder of one dataset's rows for a model that reads images.

    Rows without images take the same way: their examples have media without pixels.

    Args:
        processor: the model's processor.
        data_config: the `data:` section.
        media: the entry's folder of images; None: paths count from the folder of the rows.

    Raises:
        InputError: as ``ChatEncoder``, or the processor cannot be used for images.
    """

    def __init__(self, processor: Any, data_config: DataConfig, media: str | None = None) -> None:
        tokenizer = copy.copy(processor.tokenizer)
        tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
        self.layout = image_layout(processor)
        self._chat = ChatEncoder(tokenizer, data_config)
        self._tokenizer = TextTokenizer(tokenizer)
        self._config = data_config
        self._media = media

    def encode(self, conversations: Sequence[Conversation], train_on: TrainOn) -> list[Encoded]:
        """Encodes conversations. A bad one raises nothing.

        Args:
            conversations: rows with or without images.
            train_on: the turns in the loss.
        """
        encoded = []
        for conversation in conversations:
            try:
                encoded.append(self._encode(conversation, train_on))
            except InputError as error:
                encoded.append(Encoded(error=error))
        return encoded

    def notes(self) -> list[str]:
        """One sentence on each thing that a user should know about the template."""
        return self._chat.notes()

    def _encode(self, conversation: Conversation, train_on: TrainOn) -> Encoded:
        shown = self._find(conversation, train_on)
        rendered = self._chat.renderer.render(conversation, train_on)
        last = len(rendered) - 1
        parts = [self._encode_text(text, shown, i == last) for i, text in enumerate(rendered)]
        return replace(_joined(parts), outcomes=(*rendered[0].outcomes, *_joined(parts).outcomes))

    def _find(self, conversation: Conversation, train_on: TrainOn) -> Shown:
        """Finds and checks the images up to the last trained turn."""
        place = conversation.place
        found = sum(_num_images(message) for message in conversation.messages)
        if found != len(conversation.images):
            rule = f"must have as many places for images as images ({len(conversation.images)})"
            raise InputError(f"{place}: {rule}, got {found}")
        for i, message in enumerate(conversation.messages):
            self._check_message(message, f"{place}: messages[{i}]")
        counts = _trained_counts(conversation, train_on)
        folder = rows_folder(self._media, place)
        files = []
        shown = conversation.images[: max(counts, default=0)]
        for i, image in enumerate(shown):
            where = f"{place}: images[{i}]"
            file = find_image(image, where, folder)
            self._refuse_too_long(file, len(shown), where)
            files.append(file)
        return Shown(tuple(files), counts)

    def _check_message(self, message: Message, where: str) -> None:
        if message.role == "assistant" and _num_images(message):
            raise InputError(f"{where}: an answer must not hold an image")
        if self._config.special_tokens_in_text != "keep":
            return  # such texts are refused, or tokenized as text
        for token in (self.layout.placeholder, *self.layout.token_texts):
            if any(token in text for text in _texts(message)):
                raise InputError(f"{where}: text must not spell {token}, which stands for an image")

    def _refuse_too_long(self, file: ImageFile, num_images: int, where: str) -> None:
        try:
            num_tokens = self.layout.num_tokens(file.size, num_images)
        except InputError as error:
            raise InputError(f"{where}: {file.name}: {error}") from None
        limit = self._config.max_length
        if num_tokens >= limit and self._config.too_long != "drop":
            shape = f"{file.size[0]} x {file.size[1]} pixels"
            rule = f"must have fewer than data.max_length = {limit} tokens"
            raise InputError(f"{where}: {rule}, got {num_tokens} ({shape})")

    def _encode_text(self, rendered: Rendered, shown: Shown, is_last: bool) -> Encoded:
        text, files = self._expand(rendered, shown, is_last)
        (tokens,) = self._tokenizer.tokenize([text])
        encoded = fit([label(tokens, text)], self._config, text.place)
        if not encoded.examples:
            return encoded
        (example,) = encoded.examples
        try:
            media = place_images(files, tokens.ids, self.layout)
        except InputError as error:
            raise InputError(f"{text.place}: {error}") from None
        return replace(encoded, examples=(self._with_media(example, media, text.place),))

    def _with_media(self, example: Example, media: ImageMedia, place: str) -> Example:
        whole = len(media.images)
        media = media.cut(len(example.input_ids))
        kept = len(media.images)
        if kept == 1 < whole and self.layout.shrinks_several:
            rule = f"must keep two or none of its {whole} images within data.max_length"
            raise InputError(f"{place}: {rule}, as one by itself has other tokens, got 1")
        if (example.labels[media.token_types > 0] >= 0).any():
            raise InputError(f"{place}: a trained turn must not hold an image")
        return replace(example, media=media)

    def _expand(
        self, rendered: Rendered, shown: Shown, is_last: bool
    ) -> tuple[Rendered, tuple[ImageFile, ...]]:
        """Replaces the placeholder of each image by the text of its tokens."""
        token = self.layout.placeholder
        starts = list(_places(token, rendered))
        count = len(starts)
        expected = len(shown.files)
        if count != expected and (is_last or count not in shown.counts):
            rule = f"the chat template must write {token} for each of {expected} images"
            raise InputError(f"{rendered.place}: {rule}, got {count}")
        pieces = []
        moves = []  # ends of placeholders in the old text, and the characters that each gained
        past = 0
        for start, file in zip(starts, shown.files, strict=False):
            replacement = self.layout.replacement(file.size, count)
            pieces += [rendered.text[past:start], replacement]
            past = start + len(token)
            moves.append((past, len(replacement) - len(token)))
        text = replace(
            rendered,
            text="".join([*pieces, rendered.text[past:]]),
            spans=_moved(rendered.spans, moves),
            plain=_moved(rendered.plain, moves),
        )
        return text, shown.files[:count]


def _joined(parts: Sequence[Encoded]) -> Encoded:
    """The examples of a row from those of its texts; the row is dropped as a whole."""
    outcomes = {outcome for part in parts for outcome in part.outcomes}
    if "dropped" in outcomes:
        return Encoded(outcomes=("dropped",))
    examples = tuple(example for part in parts for example in part.examples)
    if not examples:
        return Encoded(outcomes=("unanswered",))
    return Encoded(examples, ("truncated",) if outcomes else ())


def _places(token: str, rendered: Rendered) -> Iterator[int]:
    """Starts of the placeholders that the template wrote; those in plain text are no places."""
    for match in re.finditer(re.escape(token), rendered.text):
        if not any(first <= match.start() < past for first, past in rendered.plain):
            yield match.start()


def _moved(ranges: Ranges, moves: Sequence[tuple[int, int]]) -> Ranges:
    return tuple((_moved_place(first, moves), _moved_place(past, moves)) for first, past in ranges)


def _moved_place(place: int, moves: Sequence[tuple[int, int]]) -> int:
    return place + sum(gained for end, gained in moves if end <= place)


def _trained_counts(conversation: Conversation, train_on: TrainOn) -> tuple[int, ...]:
    """Images up to each trained turn; a text ends there."""
    counts = []
    count = 0
    in_loss = messages_in_loss(conversation, train_on)
    for message, is_trained in zip(conversation.messages, in_loss, strict=True):
        count += _num_images(message)
        if is_trained:
            counts.append(count)
    return tuple(counts)


def _num_images(message: Message) -> int:
    if not isinstance(message.content, tuple):
        return 0
    return sum(part.get("type") == "image" for part in message.content)


def _texts(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [str(part.get("text", "")) for part in message.content or ()]
