"""A row as a chat template reads it: messages with all they carry, tools, images, arguments.

``rows`` makes conversations, ``template`` and ``images`` turn them into tokens. Nothing of a row
is dropped on the way: what no field here takes is an error of the reader.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_WRITER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
Part = Mapping[str, Any]  # {"type": "text", "text": ...}, or {"type": "image"}: the next image


@dataclass(frozen=True)
class Image:
    """An image of a row: a file, or the bytes of one."""

    path: str | None = None  # as in the row; relative paths count from the entry's ``media``
    content: bytes | None = None


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool; developer and others as the template knows them.
        content: text, or parts in their order; None next to a call of a tool.
        in_loss: whether the row itself puts the turn into the loss; None: ``train_on`` decides.
        fields: everything else by the names that templates read, such as reasoning_content,
            tool_calls, tool_call_id and name.
    """

    role: str
    content: str | tuple[Part, ...] | None
    in_loss: bool | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """The message as ``apply_chat_template`` takes it."""
        content = list(self.content) if isinstance(self.content, tuple) else self.content
        return {"role": self.role, "content": content, **self.fields}


@dataclass(frozen=True)
class Conversation:
    """A row, ready for a template."""

    place: str  # "file:line", for error messages
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Image, ...] = ()  # in the order of the parts that stand for them

    def key(self) -> bytes:
        """16 bytes that are equal for equal conversations, whatever file and format they are from.

        The place and the loss marks are not covered, the images by path or by content; see
        ``images.marks`` for keys that do not depend on paths.
        """
        read = {
            "messages": [message.for_template() for message in self.messages],
            "tools": self.tools,
            "arguments": self.template_arguments,
            "images": [
                image.path if image.content is None else hashlib.sha256(image.content).hexdigest()
                for image in self.images
            ],
        }
        text = _WRITER.encode(_without_nulls(read))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _without_nulls(value: Any) -> Any:
    """The value without keys that are null: some containers fill them in, others leave them out."""
    if isinstance(value, str):
        return value
    if type(value) is dict or isinstance(value, Mapping):  # the test for a mapping is slow
        return {
            key: item if isinstance(item, str) else _without_nulls(item)  # most are text
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value
