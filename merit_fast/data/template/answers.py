"""Finds the answers in the text that a template renders.

An answer is what follows the prompt, as the model sees it before it answers, up to the token at
which it stops. The text before an answer may differ from turn to turn: a template may show earlier
answers without their reasoning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from merit_fast.data.template.control import ControlTokens
from merit_fast.data.template.forms import reasoning_keys, reasoning_of, text_of
from merit_fast.data.template.jinja import Messages, Refusal, Template, Tools
from merit_fast.data.template.traces import require_reasoning

_OPENED_REASONING = re.compile(r"<think>\s*\Z")
_EMPTY_REASONING = re.compile(r"\A\s*<think>\s*</think>")
_PROBE: Messages = [
    {"role": "user", "content": "merit"},
    {"role": "assistant", "content": "fast"},
    {"role": "user", "content": "again"},
]
_CALL = {"type": "function", "function": {"name": "merit", "arguments": {"fast": "yes"}}}


@dataclass(frozen=True)
class Turn:
    """A text up to the end of a trained turn, and the characters of the turn in it."""

    text: str
    span: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """Properties of a template, found by rendering a conversation.

    Attributes:
        as_parts: it takes content as a list of parts only.
        very_end: what it writes at the end of the text, after the end of the last turn.
        ends: role -> the marker of its turn, where that is all that ends an answer before it.
    """

    as_parts: bool
    very_end: str = ""
    ends: Mapping[str, str] = field(default_factory=dict)


def probe(template: Template, arguments: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the template takes content as parts only, and a conversation as it renders it."""
    texts = []
    for as_parts in (False, True):
        messages = _probe_messages(_PROBE[:2], as_parts)
        try:
            text = template.render(messages, None, arguments, add_generation_prompt=False)
            prompt = template.render(messages[:1], None, arguments, add_generation_prompt=True)
        except Refusal:
            continue
        texts.append((as_parts, f"{text}{prompt}"))
        if "merit" in text and "fast" in text and "'text'" not in text:
            return texts[-1]
    return texts[0] if texts else (False, "")


def find_facts(
    template: Template, control: ControlTokens, arguments: Mapping[str, Any], as_parts: bool
) -> Facts:
    """Renders conversations and their beginnings, and compares."""
    messages = _probe_messages(_PROBE, as_parts)
    call = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    result = _probe_messages([{"role": "tool", "content": "again"}], as_parts)
    calling = [messages[0], *_probe_messages([call], as_parts), *result]
    very_end = _very_end(template, control, arguments, messages)
    ends = {
        "user": _end_before(template, control, arguments, messages),
        "tool": _end_before(template, control, arguments, calling),
    }
    return Facts(as_parts, very_end, {role: end for role, end in ends.items() if end})


def _very_end(
    template: Template, control: ControlTokens, arguments: Mapping[str, Any], messages: Messages
) -> str:
    try:
        text = template.render(messages[:2], None, arguments, add_generation_prompt=False)
        followed = template.render(messages, None, arguments, add_generation_prompt=False)
    except Refusal:
        return ""
    common = control.cut(text, len(os.path.commonprefix([text, followed])))
    head = text[:common]
    ends_turn = "fast" in head and head.rstrip().endswith(control.texts)
    return text[common:] if ends_turn else ""


def _end_before(
    template: Template, control: ControlTokens, arguments: Mapping[str, Any], messages: Messages
) -> str:
    """Text from an answer to the next turn's marker, if that is all that ends the answer."""
    try:
        text = template.render(messages[:2], None, arguments, add_generation_prompt=False)
        followed = template.render(messages, None, arguments, add_generation_prompt=False)
        prompt = template.render(messages[:1], None, arguments, add_generation_prompt=True)
        before = template.render(messages[:1], None, arguments, add_generation_prompt=False)
    except Refusal:
        return ""
    end = text.rstrip()
    opening = prompt[len(os.path.commonprefix([prompt, before])) :]
    marker = control.opens(followed[len(end) :]) if followed.startswith(end) else None
    if marker is None or marker in opening or end.endswith(control.texts):
        return ""  # a marker that opens an answer too does not end one
    return followed[len(end) : followed.index(marker, len(end)) + len(marker)]


class Answers:
    """Renders the turns of one conversation and finds the trained ones.

    Args:
        template: the template in force.
        control: its control tokens.
        facts: its properties.
        messages: the turns.
        tools: the tools of the row.
        arguments: further arguments of the template.
        ignored: keys of messages that may be left out.
    """

    def __init__(
        self,
        template: Template,
        control: ControlTokens,
        facts: Facts,
        messages: Messages,
        tools: Tools,
        arguments: Mapping[str, Any],
        ignored: Collection[str] = (),
    ) -> None:
        self._template = template
        self._control = control
        self._facts = facts
        self._messages = messages
        self._tools = tools
        self._arguments = arguments
        self._ignored = ignored

    def render(self, messages: Messages, tools: Tools) -> str:
        """The text of whole turns, without what the template writes at the very end."""
        text = self._template.render(messages, tools, self._arguments, add_generation_prompt=False)
        return text.removesuffix(self._facts.very_end)

    def turn(self, index: int) -> Turn:
        """The text up to the end of a trained turn.

        Raises:
            Refusal: the template fails, or nothing tells where the turn begins.
        """
        if self._messages[index]["role"] != "assistant":
            return self._other_turn(index)
        message = self._messages[index]
        prompt = self._template.render(
            self._messages[:index], self._tools, self._arguments, add_generation_prompt=True
        )
        text = self.render(self._messages[: index + 1], self._tools)
        if not text.startswith(prompt):
            text = self._behind_prompt(index, prompt, text)
        answer = text[len(prompt) :]
        self._require_answer(index, prompt, answer)
        require_reasoning(index, message, answer, self._ignored)
        text = self._closed(index, text)
        return Turn(text, (len(prompt), max(len(prompt), len(text.rstrip()))))

    def _other_turn(self, index: int) -> Turn:
        """The content of a turn that is not the assistant's, up to the end of the turn."""
        text = self.render(self._messages[: index + 1], self._tools)
        before = self.render(self._messages[:index], self._tools) if index else ""
        content = text_of(self._messages[index].get("content")).strip()
        start = text.find(content, len(before)) if text.startswith(before) else -1
        if start < 0:
            rule = f"must render the content of messages[{index}] behind the turns before it"
            raise Refusal(f"the chat template {rule}, got {text[-30:]!r}")
        return Turn(text, (start, max(start, len(text.rstrip()))))

    def _behind_prompt(self, index: int, prompt: str, text: str) -> str:
        """The prompt with the answer behind it, where the template opens the reasoning itself.

        The template shows the whole turn without its reasoning. The model sees a prompt that ends
        with <think>, and answers with reasoning, </think> and the rest.
        """
        opened = _OPENED_REASONING.search(prompt)
        if not opened or not text.startswith(prompt[: opened.start()]):
            if answer := self._behind_dropped_reasoning(index, prompt, text):
                return prompt + answer
            common = len(os.path.commonprefix([prompt, text]))
            parting = f"{prompt[common : common + 30]!r} against {text[common : common + 30]!r}"
            rule = f"must render messages[:{index}] with add_generation_prompt as a prefix"
            raise Refusal(f"the chat template {rule} of messages[:{index + 1}], got {parting}")
        message = self._messages[index]
        own = _EMPTY_REASONING.sub("", text[opened.start() :])
        content = text_of(message.get("content"))
        if "</think>" in content and "reasoning_content" not in message:
            reasoning = content.partition("</think>")[0].lstrip().removeprefix("<think>")
            return f"{prompt}{reasoning.removeprefix(opened[0][len('<think>') :])}</think>{own}"
        reasoning = reasoning_of(message).strip("\n")
        return f"{prompt}{reasoning}\n</think>\n\n{own.lstrip(chr(10))}"

    def _behind_dropped_reasoning(self, index: int, prompt: str, text: str) -> str:
        """The answer, where the template drops the reasoning of earlier calls as it shows it.

        The model sees that reasoning when it answers (gpt-oss). "" where this is not the case.
        """
        earlier = self._messages[:index]
        if not any(m.get("tool_calls") and (m.get("content") or reasoning_of(m)) for m in earlier):
            return ""
        before = self._template.render(
            earlier, self._tools, self._arguments, add_generation_prompt=False
        )
        message = self._messages[index]
        other = {**message, **dict.fromkeys(reasoning_keys(message), "merit")}
        if message.get("content"):
            is_text = isinstance(message["content"], str)
            other["content"] = "merit" if is_text else [{"type": "text", "text": "merit"}]
        changed = self.render([*earlier, other], self._tools)
        opening = prompt.removeprefix(before)
        common = len(os.path.commonprefix([text, changed]))
        at = text.rfind(opening, 0, common) if prompt.startswith(before) and opening else -1
        return "" if at < 0 else text[at + len(opening) :]

    def _require_answer(self, index: int, prompt: str, answer: str) -> None:
        message = self._messages[index]
        content = text_of(message.get("content"))
        # only the last word is compared: a template may trim an answer or move its reasoning
        words = content.rpartition("</think>")[2].split()
        if words and words[-1] not in answer:
            raise Refusal(
                f"the chat template must render the content of messages[{index}], "
                f"got {answer!r:.60}"
            )
        is_plain = message.keys() <= {"role", "content"} and not answer.lstrip().startswith(
            content.strip()
        )
        if is_plain and prompt == self._template.render(
            self._messages[:index], self._tools, self._arguments, add_generation_prompt=False
        ):
            raise Refusal(
                f"the chat template must render messages[:{index}] with add_generation_prompt "
                f"up to where the answer begins, but it ignores that flag; got {answer[:30]!r}"
            )

    def _closed(self, index: int, text: str) -> str:
        """The text up to a token that ends the answer.

        Where a template ends a turn with the marker of the next role only, the model stops there.
        """
        message = self._messages[index]
        whole = text.rstrip()
        if whole.endswith(self._control.texts):
            return text
        words = text_of(message.get("content")).split()
        end = self._facts.ends.get("tool" if "tool_calls" in message else "user")
        if end is None or ("tool_calls" not in message and words and not whole.endswith(words[-1])):
            rule = "must end an answer with a control token of the tokenizer, such as eos_token"
            raise Refusal(f"the chat template {rule}, got {whole[-20:]!r}")
        return whole + end


def _probe_messages(messages: Messages, as_parts: bool) -> list[Mapping[str, Any]]:
    if not as_parts:
        return list(messages)
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]
