"""Control tokens that a row spells out in its text, kept apart from those of the template.

Such texts are put between two marks before the template sees them. The marks are taken out of the
rendered text again, and their places tell which pieces are tokenized as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merit_fast.data.template.jinja import Refusal

_PRIVATE_USE = range(0xF0000, 0xF00FF, 2)
_IN_ANSWERS = re.compile("think", re.IGNORECASE)  # an answer may hold its reasoning as it stands


class ControlTokens:
    """Texts of the tokens that only a template may write.

    These are the special tokens, and other added tokens that the template writes around turns.
    Markup in pairs, such as <think> and </think>, is content unless it is special.

    Args:
        tokenizer: a fast tokenizer.
        written: a conversation that the template rendered.
    """

    def __init__(self, tokenizer: Any, written: str) -> None:
        added = tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added}
        chosen = {
            token.content
            for token in added
            if token.special or (token.content in written and not _is_paired(token.content, texts))
        }
        self.texts = tuple(sorted(text for text in chosen if text.strip()))
        self._any = _pattern(self.texts)
        self._in_answers = _pattern(t for t in self.texts if not _IN_ANSWERS.search(t))

    def found(self, value: Any, *, is_answer: bool = False) -> str | None:
        """The first control token that a value spells anywhere in it, None without one."""
        pattern = self._in_answers if is_answer else self._any
        for text in _strings(value):
            if match := pattern.search(text):
                return match[0]
        return None

    def cut(self, text: str, at: int) -> int:
        """``at``, or the start of the control token that it would cut in two."""
        longest = max(map(len, self.texts), default=0)
        for match in self._any.finditer(text, max(0, at - longest)):
            if match.start() < at < match.end():
                return match.start()
        return at

    def opens(self, text: str) -> str | None:
        """The control token with which a text begins, after whitespace."""
        match = self._any.match(text.lstrip())
        return match[0] if match else None


class Marks:
    """Two characters that occur nowhere in a row, around each control token that it spells."""

    def __init__(self, control: ControlTokens, row: Any) -> None:
        used = set("".join(_strings(row)))
        free = (code for code in _PRIVATE_USE if not {chr(code), chr(code + 1)} & used)
        code = next(free, None)
        if code is None:
            raise Refusal("must leave some private-use character free, found all of them used")
        self._control = control
        self._opening, self._closing = chr(code), chr(code + 1)

    def mark(self, value: Any, *, is_answer: bool = False) -> Any:
        """A copy of a value of JSON with marks around every control token.

        Raises:
            Refusal: a key spells one; templates look keys up, so they cannot be marked.
        """
        if isinstance(value, str):
            pattern = self._control._in_answers if is_answer else self._control._any
            return pattern.sub(f"{self._opening}\\g<0>{self._closing}", value)
        if isinstance(value, Mapping):
            if spelled := self._control.found(list(value)):
                raise Refusal(f"names of keys must spell no control token, got {spelled}")
            return {key: self.mark(item, is_answer=is_answer) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self.mark(item, is_answer=is_answer) for item in value]
        return value

    def unmark(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[str, tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Takes the marks out of a text.

        Returns:
            The text, the spans in it, and the ranges of the marked tokens.

        Raises:
            Refusal: the template wrote a mark in another way, so that it cannot be found.
        """
        if any(f"\\u{unit}" in text.lower() for unit in self._escaped()):
            raise Refusal("the chat template must write text that spells a control token unescaped")
        pieces = re.split(f"([{self._opening}{self._closing}])", text)
        kept: list[str] = []
        plain: list[tuple[int, int]] = []
        places: list[int] = []  # of the marks, in the marked text
        opened: int | None = None
        length = 0
        for piece in pieces:
            if piece == self._opening and opened is None:
                opened = length
            elif piece == self._closing and opened is not None:
                plain.append((opened, length))
                opened = None
            elif piece in (self._opening, self._closing):
                raise Refusal("the chat template must keep text that spells a control token whole")
            else:
                kept.append(piece)
                length += len(piece)
                continue
            places.append(length + len(places))
        moved = tuple(
            (start - sum(p < start for p in places), end - sum(p < end for p in places))
            for start, end in spans
        )
        return "".join(kept), moved, tuple(plain)

    def _escaped(self) -> list[str]:
        """The last UTF-16 unit of each mark, as JSON escapes it."""
        marks = (self._opening, self._closing)
        return [mark.encode("utf-16-be")[2:].hex() for mark in marks]


def _is_paired(text: str, texts: set[str]) -> bool:
    """Whether a token opens or closes markup: <x> and </x>, [X] and [/X]."""
    opening = text[:1]
    rest = text[1:]
    partner = opening + rest[1:] if rest.startswith("/") else f"{opening}/{rest}"
    return partner in texts


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
