"""Measures the cost of training: loss on a general text and on the base's answers to fixed prompts.

Without these columns an effect stays invisible: joint training at a high learning rate wins on the
mixture while its answers shrink to a few words.
"""

from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import nn

from merit_fast.data import IGNORED_LABEL, Example, collate
from merit_fast.evaluate.losses import mean_loss

_WINDOW_TOKENS = 512

PROMPTS = (
    "What is the difference between weather and climate?",
    "Give me three tips for sleeping better.",
    "Explain how a bicycle stays upright.",
    "Write a short poem about autumn.",
    "Why is the sky blue?",
    "How do I make a simple tomato soup?",
    "Summarize the story of Romeo and Juliet.",
    "What should I pack for a weekend in the mountains?",
    "Explain what an algorithm is to a child.",
    "List the planets of the solar system.",
    "How can I learn a new language quickly?",
    "What are the advantages of public transport?",
    "Write a polite email asking for a day off.",
    "How does a vaccine work?",
    "What is 12 times 7, and how do you compute it?",
    "Describe a typical day of a nurse.",
)


def text_loss(model: nn.Module, tokenizer: Any, pad_token_id: int) -> float:
    """Nats per token of the packaged English text, in windows of 512 tokens."""
    text = (
        resources.files("merit_fast.evaluate")
        .joinpath("general_text.txt")
        .read_text(encoding="utf-8")
    )
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    windows = [ids[at : at + _WINDOW_TOKENS] for at in range(0, len(ids), _WINDOW_TOKENS)]
    examples = [_all_targets(window, first=1) for window in windows if len(window) > 1]
    return mean_loss(model, examples, pad_token_id, batch_size=1)


def greedy_answers(
    model: nn.Module, tokenizer: Any, pad_token_id: int, max_new_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of ``PROMPTS`` and of the model's greedy answers, with the end token if reached."""
    prompts = [_prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    examples = [
        Example(np.array(ids, np.int32), np.full(len(ids), IGNORED_LABEL, np.int32))
        for ids in prompts
    ]
    batch = collate(examples, [0] * len(examples), pad_token_id)
    ends = _end_token_ids(model, tokenizer)
    device = next(model.parameters()).device
    with torch.inference_mode():
        sequences = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            eos_token_id=ends,
        )
    answers = [_until_end(row, ends) for row in sequences[:, batch.input_ids.shape[1] :].tolist()]
    return prompts, answers


def answers_nll(
    model: nn.Module, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_token_id: int
) -> float:
    """Nats per token of ``answers`` under ``model``; the base model wrote them."""
    examples = [
        _all_targets(np.array(prompt + answer, np.int32), first=len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]
    return mean_loss(model, examples, pad_token_id, batch_size=8)


def _all_targets(ids: np.ndarray, first: int) -> Example:
    labels = ids.copy()
    labels[:first] = IGNORED_LABEL
    return Example(ids, labels)


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(f"{prompt}\n")["input_ids"])


def _end_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None})


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1]
    return row
