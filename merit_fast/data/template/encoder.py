"""Turns conversations into examples: rendered, tokenized, cut to length, joined to trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.config import DataConfig, TrainOn
from merit_fast.data.conversation import Conversation
from merit_fast.data.dataset import IGNORED_LABEL, Example, count_target_tokens
from merit_fast.data.template.render import Rendered, Renderer
from merit_fast.data.template.tokenizer import require_offsets
from merit_fast.data.template.tokens import TextTokenizer, Tokens, label
from merit_fast.data.tree import build_within
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = tuple[NDArray[np.int32], NDArray[np.int32]]  # input_ids, labels


@dataclass(frozen=True, eq=False)
class Encoded:
    """The examples of a conversation; none where it is left out.

    Attributes:
        outcomes: words counted in the dataset's notes, such as truncated, dropped, rewritten.
        error: the conversation cannot be trained on as it stands.
    """

    examples: tuple[Example, ...] = ()
    outcomes: tuple[str, ...] = ()
    error: InputError | None = None


class ChatEncoder:
    """A tokenizer with the chat template in force.

    Args:
        tokenizer: a fast tokenizer; its settings for padding and truncation are not used.
        data_config: the `data:` section.

    Raises:
        InputError: there is no template or template file, "plain" has no end token, the template
            does not read an argument of `data.template_arguments`, or the tokenizer gives no
            offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data_config: DataConfig) -> None:
        require_offsets(tokenizer)
        self._config = data_config
        self.renderer = Renderer(tokenizer, data_config)
        self._tokenizer = TextTokenizer(tokenizer)

    def encode(self, conversations: Sequence[Conversation], train_on: TrainOn) -> list[Encoded]:
        """Encodes conversations in one call of the tokenizer. A bad one raises nothing.

        Args:
            conversations: rows of text.
            train_on: the turns in the loss.
        """
        rendered: list[list[Rendered] | InputError] = []
        for conversation in conversations:
            try:
                rendered.append(self.renderer.render(conversation, train_on))
            except InputError as error:
                rendered.append(error)
        tokens = iter(self._tokenize([item for item in rendered if isinstance(item, list)]))
        return [
            Encoded(error=item)
            if isinstance(item, InputError)
            else self._finish(item, next(tokens))
            for item in rendered
        ]

    def notes(self) -> list[str]:
        """One sentence on each thing that a user should know about the template."""
        if not self.renderer.template.reads_date:
            return []
        return [f"the chat template reads the date, which is {self._config.date} (data.date)"]

    def _tokenize(self, rows: Sequence[list[Rendered]]) -> list[list[Tokens] | InputError]:
        """Tokens of each row's texts; a row with text that is not Unicode keeps the others."""
        try:
            flat = iter(self._tokenizer.tokenize([text for row in rows for text in row]))
            return [[next(flat) for _ in row] for row in rows]
        except InputError as error:
            if len(rows) == 1:
                return [error]
            return [tokens for row in rows for tokens in self._tokenize([row])]

    def _finish(self, row: list[Rendered], tokens: list[Tokens] | InputError) -> Encoded:
        if isinstance(tokens, InputError):
            return Encoded(error=tokens)
        try:
            texts = [label(found, item) for found, item in zip(tokens, row, strict=True)]
            encoded = fit(texts, self._config, row[0].place)
        except InputError as error:
            return Encoded(error=error)
        return replace(encoded, outcomes=(*row[0].outcomes, *encoded.outcomes))


def fit(texts: Sequence[Text], config: DataConfig, place: str) -> Encoded:
    """Applies `data.too_long` to the texts of a row, and joins those that are left.

    Args:
        texts: input_ids and labels of each.
        config: the `data:` section.
        place: "file:line" of the row.

    Raises:
        InputError: a text is longer than `data.max_length`, and `data.too_long` is error.
    """
    limit = config.max_length
    longest = max(len(input_ids) for input_ids, _ in texts)
    if longest <= limit:
        return Encoded(tuple(build_within(texts, limit)))
    if config.too_long == "error":
        rule = f"must have at most data.max_length = {limit} tokens"
        raise InputError(f"{place}: {rule}, got {longest}")
    if config.too_long == "drop":
        return Encoded(outcomes=("dropped",))
    kept = [shortened for text in texts if (shortened := _shorten(text, limit))]
    if not kept:
        return Encoded(outcomes=("unanswered",))
    return Encoded(tuple(build_within(kept, limit)), ("truncated",))


def _shorten(text: Text, limit: int) -> Text | None:
    """The text up to its last target within the limit; None without one."""
    input_ids, labels = (values[:limit] for values in text)
    if not count_target_tokens(labels):
        return None
    end = int(np.flatnonzero(labels != IGNORED_LABEL)[-1]) + 1
    return input_ids[:end].copy(), labels[:end].copy()
