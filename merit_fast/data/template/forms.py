"""Messages in the forms that templates take: as the row gives them, then with remedies.

Some templates have no system role, lose a system message, take only one, or take the arguments of
a call as text only. Each remedy is a form of its own; the first that the template renders whole is
used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merit_fast.data.conversation import Conversation

FOLDED = "folded"  # outcome: a system message became a part of a user's turn
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing


@dataclass(frozen=True)
class Form:
    """Messages as a template gets them.

    Attributes:
        messages: one mapping per turn.
        in_loss: whether each turn is trained.
        outcomes: words counted in the notes of the dataset.
        refits_calls: the form differs from the one before it in the calls of tools only.
    """

    messages: tuple[dict[str, Any], ...]
    in_loss: tuple[bool, ...]
    outcomes: tuple[str, ...] = ()
    refits_calls: bool = False


def forms(conversation: Conversation, in_loss: Sequence[bool], as_parts: bool) -> Iterator[Form]:
    """Yields the row as it came, then the results of the remedies that apply to it.

    Args:
        conversation: the row.
        in_loss: whether each message is trained.
        as_parts: the template takes content as a list of parts only.
    """
    messages = tuple(
        _plain(message.for_template(), as_parts=as_parts) for message in conversation.messages
    )
    form = Form(messages, tuple(in_loss))
    yield form
    calls = any("tool_calls" in message for message in messages)
    if calls:
        yield from _with_other_calls(form)
    roles = [message["role"] for message in messages]
    if "developer" in roles:
        form = replace(form, messages=tuple(_as_system(message) for message in messages))
        yield form
    if "system" not in roles and "developer" not in roles:
        return
    joined = _join_leading(form, as_parts)
    if len(joined.messages) < len(form.messages):
        yield joined
    if folded := _fold(form, as_parts):
        yield folded
        if calls:
            yield from _with_other_calls(folded)


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of a turn, from its own key or from the front of its content."""
    for key in _REASONING:
        if isinstance(message.get(key), str):
            return str(message[key])
    content = message.get("content")
    if not isinstance(content, str) or "</think>" not in content:
        return ""
    return content.partition("</think>")[0].rpartition("<think>")[2]


def text_of(content: Any) -> str:
    """The text of a content, whether it is text or parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in content or () if "text" in part)


def reasoning_keys(message: Mapping[str, Any]) -> list[str]:
    """The keys under which a message holds its reasoning."""
    return [key for key in _REASONING if message.get(key) is not None]


def _plain(message: dict[str, Any], *, as_parts: bool) -> dict[str, Any]:
    """The message without empty keys, its reasoning under each name, its text in one piece."""
    kept = {key: value for key, value in message.items() if value is not None}
    content = kept.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        kept["content"] = text_of(content)
    if as_parts and isinstance(kept.get("content"), str):
        kept["content"] = [{"type": "text", "text": kept["content"]}]
    if names := reasoning_keys(kept):
        kept = {"thinking": kept[names[0]], **kept, "reasoning_content": kept[names[0]]}
    return kept


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _with_other_calls(form: Form) -> Iterator[Form]:
    """Calls next to an empty content, then next to none and with their arguments as JSON text."""
    for content, as_text in (("", False), (None, True)):
        messages = tuple(
            {"content": content, **(_text_arguments(message) if as_text else message)}
            for message in form.messages
        )
        yield replace(form, messages=messages, refits_calls=True)


def _text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        arguments = function.get("arguments")
        if not isinstance(arguments, str):
            function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else message


def _join_leading(form: Form, as_parts: bool) -> Form:
    count = 0
    while count < len(form.messages) and form.messages[count]["role"] == "system":
        count += 1
    texts = [text_of(message.get("content")) for message in form.messages[:count]]
    if count < 2 or any(form.in_loss[:count]):
        return form
    first = _plain({"role": "system", "content": "\n\n".join(texts)}, as_parts=as_parts)
    return replace(
        form,
        messages=(first, *form.messages[count:]),
        in_loss=(False, *form.in_loss[count:]),
    )


def _fold(form: Form, as_parts: bool) -> Form | None:
    """Puts system messages in front of the next user's turn.

    None where no such turn follows, or a system message is trained.
    """
    messages = []
    in_loss = []
    waiting: list[str] = []
    for message, trained in zip(form.messages, form.in_loss, strict=True):
        if message["role"] == "system":
            if trained:
                return None
            waiting.append(text_of(message.get("content")))
            continue
        if message["role"] == "user" and waiting:
            message = {**message, "content": _in_front(waiting, message.get("content", ""))}
            waiting = []
        messages.append(message)
        in_loss.append(trained)
    return None if waiting else Form(tuple(messages), tuple(in_loss), (FOLDED,))


def _in_front(texts: Sequence[str], content: Any) -> Any:
    head = "\n\n".join(text for text in texts if text)
    if not head:
        return content
    if isinstance(content, str):
        return f"{head}\n\n{content}"
    return [{"type": "text", "text": f"{head}\n\n"}, *content]
