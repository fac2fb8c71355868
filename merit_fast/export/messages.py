"""Writes a conversation in the form of a stack, for rows that it cannot read as they came."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merit_fast.data.conversation import Conversation, Image, Message
from merit_fast.errors import InputError
from merit_fast.export.rows import ExportRow
from merit_fast.export.survey import is_alternating

MARK = "train"  # key of a turn: whether it is in the loss
Images = Callable[[Image], str]  # an image's absolute path


class ImageFiles:
    """Paths of the images of exported rows; bytes become files.

    Args:
        media: the folder from which a dataset's paths count.
        out: the folder for images that rows hold as bytes, while it is filled.
        final: its path when the export is complete.
    """

    def __init__(self, media: str | None, out: Path, final: Path) -> None:
        self._media = Path(media or ".").expanduser()
        self._out = out
        self._final = final

    def __call__(self, image: Image) -> str:
        """The absolute path of an image."""
        if image.content is None:
            assert image.path is not None
            return os.path.abspath(self._media / image.path)
        name = hashlib.sha256(image.content).hexdigest()[:32]
        file = self._out / name
        if not file.exists():
            self._out.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image.content)
        return os.path.abspath(self._final / name)


def chat_messages(row: ExportRow, images: Images) -> list[dict[str, Any]]:
    """Messages with role and content, each with its mark for the loss.

    Arguments of calls become JSON text, so that all rows of a file have one schema.
    """
    paths = [images(image) for image in row.conversation.images]
    taken = iter(paths)
    return [
        {**_message(message, lambda: {"type": "image", "path": next(taken)}), MARK: in_loss}
        for message, in_loss in zip(row.conversation.messages, row.in_loss, strict=True)
    ]


def template_messages(
    conversation: Conversation, *, as_parts: bool = False
) -> list[dict[str, Any]]:
    """Messages as a chat template reads them; ``as_parts``: every content is a list of parts."""
    messages = []
    for message in conversation.messages:
        content = _content(message, None)
        if as_parts and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        messages.append({**message.fields, "role": message.role, "content": content})
    return messages


def tagged_messages(row: ExportRow) -> list[dict[str, str]]:
    """Messages of LLaMA-Factory: a call is a turn of function_call, a result an observation.

    Raises:
        InputError: turns do not alternate, or a message holds what that form has no place for.
    """
    conversation = row.conversation
    if not is_alternating(conversation):
        roles = ", ".join(message.role for message in conversation.messages)
        raise InputError(
            f"{conversation.place}: user and assistant must alternate for llamafactory, which "
            f"drops other rows, got {roles}"
        )
    return [_tagged(message, conversation.place) for message in conversation.messages]


def _tagged(message: Message, place: str) -> dict[str, str]:
    fields = dict(message.fields)
    fields.pop("tool_call_id", None)
    fields.pop("name", None)
    calls = fields.pop("tool_calls", None)
    thoughts = fields.pop("reasoning_content", None)
    if fields:
        raise InputError(
            f"{place}: {', '.join(fields)}: llamafactory has no place for it in a turn"
        )
    text = text_of(message)
    role = {"tool": "observation"}.get(message.role, message.role)
    if calls:
        functions = [call.get("function", call) for call in calls]
        written = [{key: call.get(key) for key in ("name", "arguments")} for call in functions]
        text += json.dumps(written, ensure_ascii=False)
        role = "function_call"
    return {"role": role, "content": with_thoughts(thoughts, text)}


def text_of(message: Message) -> str:
    """The content as one text, with <image> in the place of each image."""
    content = _content(message, lambda: "<image>")
    return content if isinstance(content, str) else "".join(content or ())


def with_thoughts(thoughts: str | None, text: str) -> str:
    """The text behind the reasoning, as stacks that have no field for it read both."""
    return f"<think>\n{thoughts}\n</think>\n\n{text}" if thoughts else text


def _message(message: Message, image: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    fields = dict(message.fields)
    if calls := fields.get("tool_calls"):
        fields["tool_calls"] = [_with_text_arguments(call) for call in calls]
    return {"role": message.role, "content": _content(message, image), **fields}


def _with_text_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str | None):
        return call
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _content(message: Message, image: Callable[[], Any] | None) -> Any:
    """The content: a string where the parts are texts only, or the marker of an image is one."""
    if not isinstance(message.content, tuple):
        return message.content
    parts: list[Any] = []
    for part in message.content:
        if part["type"] == "image":
            parts.append(image() if image else dict(part))
        else:
            parts.append(part["text"])
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
