"""Checks that a template renders everything that a row carries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from merit_fast.data.rows.values import is_empty
from merit_fast.data.template.forms import reasoning_keys, reasoning_of, text_of
from merit_fast.data.template.jinja import LeftOut, Messages, Refusal, Tools

Render = Callable[[Messages, Tools], str]

_LINKS = frozenset({"tool_call_id", "id", "index", "type"})  # tie a result to its call
_OWN_CHECK = frozenset({"role", "content", "reasoning_content", "thinking", "reasoning"})


def require_contents(messages: Messages, tools: Tools, text: str, render: Render) -> None:
    """Raises LeftOut if the content of a message leaves no trace in a text of all of them.

    Args:
        messages: the turns of the text.
        tools: the tools that it shows.
        text: the rendered turns.
        render: renders changed turns.
    """
    unchanged = ""  # the text may hold remedies
    for i, message in enumerate(messages):
        content = text_of(message.get("content"))
        if content.strip() in text:
            continue
        unchanged = unchanged or render(messages, tools)
        changed = {**message, "content": "merit"}
        if not isinstance(message["content"], str):
            changed["content"] = [{"type": "text", "text": "merit"}]
        if _same(render, [*messages[:i], changed, *messages[i + 1 :]], tools, unchanged):
            rule = f"must render the content of messages[{i}] ({message['role']})"
            raise LeftOut(f"the chat template {rule}, which it leaves out")


def require_fields(
    messages: Messages, tools: Tools, text: str, render: Render, ignored: Collection[str]
) -> None:
    """Raises LeftOut if a key of a message, a call or the tools leave no trace in the text.

    Names that link a result to its call need none, nor does reasoning: earlier turns may lose
    theirs by design.

    Args:
        messages: the turns of the text.
        tools: the tools that it shows.
        text: the rendered turns.
        render: renders changed turns.
        ignored: keys that may be left out.
    """
    for tool in tools or ():
        name = str(_function(tool).get("name", ""))
        if "tools" not in ignored and name not in text:
            raise LeftOut(f"tools: must be read by the chat template, which leaves out {name}")
    for i, message in enumerate(messages):
        for key in message.keys() - _OWN_CHECK - _LINKS - set(ignored):
            if is_empty(message[key]):
                continue  # holds nothing that could be lost
            if key == "name" and message["role"] in ("tool", "function"):
                continue  # the call before it has the name
            for less in _without(message, key):
                if _same(render, [*messages[:i], less, *messages[i + 1 :]], tools, text):
                    rule = "must be read by the chat template, which leaves it out; "
                    remedy = "data.ignore_columns names keys that may be left out"
                    raise LeftOut(f"messages[{i}].{key}: {rule}{remedy}")


def require_reasoning(
    index: int, message: Mapping[str, Any], answer: str, ignored: Collection[str]
) -> None:
    """Raises LeftOut if a trained answer lost its reasoning, unless its key is ignored."""
    if set(reasoning_keys(message)) & set(ignored):
        return
    word = _last_word(reasoning_of(message))
    if word not in answer:
        key = next(iter(reasoning_keys(message)), "content")
        rule = "must be read by the chat template, which leaves out the reasoning"
        raise LeftOut(f"messages[{index}].{key}: {rule}")


def has_fields(messages: Messages, tools: Tools) -> bool:
    """Whether messages hold more than a role and a content."""
    return bool(tools) or any(message.keys() - {"role", "content"} for message in messages)


def _without(message: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The message without the key, or once without each of several calls."""
    rest = {other: value for other, value in message.items() if other != key}
    if key != "tool_calls":
        return [rest]
    calls = list(message[key])
    if len(calls) == 1:
        return [{"content": "", **rest}]
    return [{**message, key: calls[:i] + calls[i + 1 :]} for i in range(len(calls))]


def _same(render: Render, messages: Sequence[Any], tools: Tools, text: str) -> bool:
    try:
        return render(messages, tools) == text
    except Refusal:  # the template reads what is missing
        return False


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = tool.get("function")
    return inner if isinstance(inner, Mapping) else tool


def _last_word(text: str) -> str:
    """The last word after the reasoning: a template may trim a text or move its reasoning."""
    return (text.rpartition("</think>")[2].split() or [""])[-1]
