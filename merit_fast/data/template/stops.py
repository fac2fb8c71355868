"""Tells at which tokens a model stops after training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from merit_fast.data.config import DataConfig
from merit_fast.data.conversation import Conversation, Message
from merit_fast.data.dataset import IGNORED_LABEL, Example
from merit_fast.data.template.encoder import ChatEncoder
from merit_fast.data.tree import expand
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CALL = {"type": "function", "function": {"name": "merit", "arguments": {"fast": "yes"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "merit",
        "description": "merit",
        "parameters": {"type": "object", "properties": {"fast": {"type": "string"}}},
    },
}


def end_token_ids(tokenizer: PreTrainedTokenizerBase, data_config: DataConfig) -> tuple[int, ...]:
    """Ids that end an answer under the template in force, that of plain answers first.

    Args:
        tokenizer: a fast tokenizer.
        data_config: the `data:` section.

    Raises:
        InputError: there is no template, or it does not render a question and an answer.
    """
    encoder = ChatEncoder(tokenizer, data_config)
    user = Message("user", "merit")
    answer = Message("assistant", "fast")
    call = Message("assistant", None, fields={"tool_calls": [_CALL]})
    plain = Conversation("chat template", (user, answer))
    calling = Conversation("chat template", (user, call), (_TOOL,))
    ids = []
    for encoded in encoder.encode([plain, calling], "all"):
        if encoded.examples:
            ids.append(int(encoded.examples[0].input_ids[-1]))
        elif not ids and encoded.error:
            raise encoded.error
    return tuple(dict.fromkeys(ids))


def check_stops(
    tokenizer: Any, end_ids: Sequence[int], examples: Sequence[Example], max_length: int
) -> tuple[int, ...]:
    """Ids with which the answers of examples end.

    Args:
        tokenizer: shows a token in the error.
        end_ids: ids at which the saved model stops.
        examples: examples to look at.
        max_length: `data.max_length`; an answer that ends there may have been cut.

    Raises:
        InputError: an answer ends in another token.
    """
    found: dict[int, None] = {}
    for example in (text for joined in examples for text in expand(joined)):
        is_target = example.labels != IGNORED_LABEL
        ends = np.flatnonzero(is_target & ~np.append(is_target[1:], False))
        for end in ends[ends + 1 < max_length].tolist():
            token_id = int(example.input_ids[end])
            if token_id not in end_ids:
                stops = ", ".join(repr(tokenizer.decode([i])) for i in end_ids)
                rule = f"every answer must end in a token at which the model stops ({stops})"
                raise InputError(f"{rule}, got {tokenizer.decode([token_id])!r}")
            found[token_id] = None
    return tuple(found)
