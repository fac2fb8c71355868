"""Turns messages into token ids and label masks, for any template that a prefix check can follow.

The text that a template adds between "messages[:i] and the opening of the answer" and
"messages[:i+1]" is turn i's answer with its end token. The whole text is tokenized once, and
offsets tell which tokens hold characters of an answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.dataset import IGNORED_LABEL, Example
from merit_fast.errors import InputError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]  # as apply_chat_template takes it

PLAIN = "plain"
_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
# a template is a program: it may fail in any of these ways
_TEMPLATE_FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Rendered:
    """One text and the half-open character ranges of its answers, in order."""

    where: str
    text: str
    spans: tuple[tuple[int, int], ...]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a model folder or hub id. Runs no code from the model's files.

    Raises:
        InputError: the tokenizer is missing, broken, or slow (without character offsets).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # the Rust library raises bare Exception for a broken tokenizer.json
        raise InputError(f"{model}: no tokenizer could be loaded: {one_line(error)}") from error
    _require_offsets(tokenizer)
    return tokenizer  # type: ignore[no-any-return]


def read_template(chat_template: str) -> str:
    """Reads the Jinja file that `data.chat_template` names.

    Raises:
        InputError: the file does not exist, or is not UTF-8.
    """
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"must be {PLAIN} or the path of a Jinja file"
        raise InputError(
            f"data.chat_template: {rule}, got {chat_template!r} ({one_line(error)})"
        ) from None


class ChatEncoder:
    """A tokenizer with the chat template in force.

    Args:
        tokenizer: a fast tokenizer; its settings for padding and truncation are not used.
        chat_template: the value of `data.chat_template`.

    Raises:
        InputError: there is no template or template file, "plain" has no end token, or the
            tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        _require_offsets(tokenizer)
        self._tokenizer = tokenizer
        self._template = _resolve_template(tokenizer, chat_template)

    def render(self, messages: Sequence[Message], where: str) -> list[Rendered]:
        """Applies the template; messages after the last answer are left out.

        Some templates rewrite earlier turns once later ones follow (Qwen3 drops their thinking).
        Then no single text shows every turn as the model would have written it. Such a row gives
        one text per answer, each with the history that the template shows the model at that turn;
        every answer is in exactly one span.

        Returns:
            One text with a span per answer, or one text per answer. Empty if the assistant says
            nothing.

        Raises:
            InputError: the template fails, or no prefix relation tells where an answer begins.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [self._render_turn(messages[: i + 1], where) for i in answers]
        if not turns:
            return []
        whole = turns[-1].text
        if all(whole.startswith(turn.text[: turn.spans[0][1]]) for turn in turns):
            return [Rendered(where, whole, tuple(turn.spans[0] for turn in turns))]
        return turns

    def encode(self, rendered: Sequence[Rendered]) -> list[Example]:
        """Tokenizes each text once. A token that holds any character of an answer is a target.

        Raises:
            InputError: a text is not valid Unicode, or has no target token.
        """
        for item in rendered:
            if not _is_encodable(item.text):
                rule = "must be valid Unicode, got an unpaired surrogate (\\ud800-\\udfff)"
                raise InputError(f"{item.where}: {rule}")
        encoded = self._tokenizer(
            [item.text for item in rendered],
            add_special_tokens=False,  # the template wrote them
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            _label(ids, offsets, item)
            for ids, offsets, item in zip(
                encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True
            )
        ]

    def _render_turn(self, messages: Sequence[Message], where: str) -> Rendered:
        """Renders the messages up to an answer; the span leaves out whitespace at the end."""
        last = len(messages) - 1
        if last == 0:
            raise InputError(
                f"{where}: messages[0]: must be a system or user message, got the assistant's"
            )
        prompt = self._apply(messages[:last], where, add_generation_prompt=True)
        text = self._apply(messages, where, add_generation_prompt=False)
        rule = (
            f"{where}: the chat template must render messages[:{last}] with add_generation_prompt"
        )
        if not text.startswith(prompt):
            common = len(os.path.commonprefix([prompt, text]))
            parting = f"{prompt[common : common + 30]!r} against {text[common : common + 30]!r}"
            raise InputError(f"{rule} as a prefix of messages[:{last + 1}], got {parting}")
        answer = text[len(prompt) :]
        content = messages[last]["content"]
        # only the last word is compared: a template may trim an answer or move its thinking block
        if not all(word in answer for word in content.rpartition("</think>")[2].split()[-1:]):
            raise InputError(
                f"{where}: the chat template must render the content of messages[{last}], "
                f"got {answer!r:.60}"
            )
        opens_with_answer = answer.lstrip().startswith(content.strip())
        if not opens_with_answer and prompt == self._apply(
            messages[:last], where, add_generation_prompt=False
        ):
            raise InputError(
                f"{rule} up to where the answer begins, but it ignores that flag; "
                f"got {answer[:30]!r}"
            )
        return Rendered(where, text, ((len(prompt), max(len(prompt), len(text.rstrip()))),))

    def _apply(
        self, messages: Sequence[Message], where: str, *, add_generation_prompt: bool
    ) -> str:
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=self._template,
            )
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"chat template, line {error.lineno}: must be Jinja: {one_line(error)}"
            ) from None
        except (jinja2.TemplateError, *_TEMPLATE_FAILURES) as error:
            raise InputError(
                f"{where}: the chat template refuses this row: {one_line(error)}"
            ) from None
        return str(text)


def _resolve_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str:
    if chat_template == PLAIN:
        if not tokenizer.eos_token:
            rule = f"{PLAIN} needs an end token, but the tokenizer has no eos_token"
            raise InputError(f"data.chat_template: {rule}")
        return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + _PLAIN_TEMPLATE
    if chat_template is None:
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer has no chat template; set data.chat_template: {PLAIN} "
                "(prompt, newline, answer, end token) or the path of a Jinja file"
            )
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:  # several named templates, none of them the default
            raise InputError(
                f"data.chat_template: must be set for this tokenizer: {one_line(error)}"
            ) from None
    return read_template(chat_template)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model expects its begin token before plain text: Llama does, GPT-2 does not."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    if not getattr(tokenizer, "is_fast", False):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise InputError(
            f"{name}: needs a fast tokenizer (tokenizer.json), whose character offsets tell "
            f"which tokens are the answer's; got the slow {type(tokenizer).__name__}"
        )


def _label(ids: Sequence[int], offsets: Any, item: Rendered) -> Example:
    ranges = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    is_target = _in_spans(ranges[:, 0], ranges[:, 1], item.spans)
    is_target[:1] = False  # nothing predicts the first token
    targets = np.flatnonzero(is_target)
    if not len(targets):
        rule = "must have an answer of the assistant with at least one token"
        raise InputError(f"{item.where}: {rule}, found none")
    length = int(targets[-1]) + 1
    input_ids = np.asarray(ids[:length], dtype=np.int32)
    labels = np.where(is_target[:length], input_ids, np.int32(IGNORED_LABEL)).astype(np.int32)
    return Example(input_ids, labels)


def _in_spans(
    starts: NDArray[np.int64], ends: NDArray[np.int64], spans: Sequence[tuple[int, int]]
) -> NDArray[np.bool_]:
    # Byte-level tokenizers trim spaces off offsets: a token of spaces has the empty range where it
    # ends. It lies inside a span that reaches further, and spans do: none of them ends in
    # whitespace.
    inside = np.zeros(len(starts), dtype=bool)
    for first, past in spans:
        inside |= (starts < past) & (ends > first)
    return inside


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
