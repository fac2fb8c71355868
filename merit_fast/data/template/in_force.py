"""Tokenizers with the chat template in force, and the prompts that it makes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from merit_fast.data.config import DataConfig
from merit_fast.data.template.render import Renderer
from merit_fast.data.template.tokenizer import resolve_template


def with_template(tokenizer: Any, data_config: DataConfig) -> Any:
    """A copy of a tokenizer whose own chat template is the one in force.

    Args:
        tokenizer: a fast tokenizer, or a processor that holds one.
        data_config: the `data:` section.

    Raises:
        InputError: there is no such template.
    """
    inner = copy.copy(getattr(tokenizer, "tokenizer", tokenizer))
    if data_config.chat_template is not None:
        inner.chat_template = resolve_template(inner, data_config.chat_template)
    elif inner is not tokenizer and getattr(tokenizer, "chat_template", None):
        inner.chat_template = tokenizer.chat_template
    return inner


def prompt_ids(tokenizer: Any, data_config: DataConfig, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts as the template shows them to the model before its answer.

    Args:
        tokenizer: a fast tokenizer, or a processor that holds one.
        data_config: the `data:` section.
        prompts: texts of a user.

    Raises:
        InputError: there is no template, or it does not render a question.
    """
    tokenizer = with_template(tokenizer, data_config)
    renderer = Renderer(tokenizer, data_config)
    texts = [renderer.prompt(prompt) for prompt in prompts]
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
