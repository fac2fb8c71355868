"""Measures the cost of training: loss on a general text and on the base's answers to fixed prompts.

Without these columns an effect stays invisible: joint training at a high learning rate wins on the
mixture while its answers shrink to a few words.
"""

from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from merit_fast.data import IGNORED_LABEL, Example, collate
from merit_fast.evaluate.losses import Advance
from merit_fast.evaluate.prefixes import fill_prefixes, shared_length, without_prefix
from merit_fast.model import forget_positions

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


def text_windows(tokenizer: Any) -> list[Example]:
    """The packaged English text in windows of 512 tokens, every token but the first a target."""
    text = (
        resources.files("merit_fast.evaluate")
        .joinpath("general_text.txt")
        .read_text(encoding="utf-8")
    )
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    windows = [ids[at : at + _WINDOW_TOKENS] for at in range(0, len(ids), _WINDOW_TOKENS)]
    return [all_targets(window, first=1) for window in windows if len(window) > 1]


def answer_rows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[Example]:
    """Prompts with the base's answers as rows whose targets are the answers."""
    return [
        all_targets(np.array([*prompt, *answer], np.int32), first=len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


def greedy_answers(
    model: nn.Module,
    end_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    max_new_tokens: int,
    share: bool = False,
    advance: Advance = lambda tokens: None,
) -> list[list[int]]:
    """Token ids of the model's greedy answers to ``prompts``, with the end token if reached.

    One batch holds all prompts; it ends when every answer has.

    Args:
        model: a causal language model.
        end_ids: tokens that end an answer; those of the model's generation config do too.
        prompts: token ids.
        pad_token_id: the id that fills the batch.
        max_new_tokens: the length at which an answer is cut.
        share: computes the prompts' common beginning once; see ``losses.can_share``.
        advance: gets the number of tokens of every step.

    Raises:
        ValueError: ``share`` with a model that cannot.
    """
    rows = [
        Example(np.array(ids, np.int32), np.full(len(ids), IGNORED_LABEL, np.int32))
        for ids in prompts
    ]
    forget_positions(model)
    inputs = _generation_inputs(model, rows, shared_length(rows) if share else 0, pad_token_id)
    ends = _end_token_ids(model, end_ids)
    steps = 0

    def count(ids: Tensor, scores: Any) -> Tensor:
        nonlocal steps
        steps += 1
        advance(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # ends no answer

    with torch.inference_mode():
        sequences = model.generate(  # type: ignore[operator]
            **inputs,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token_id,
            eos_token_id=ends,
            stopping_criteria=[count],
        )
    advance((max_new_tokens - steps) * len(rows))
    written = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until_end(row, ends) for row in written]


def _generation_inputs(
    model: nn.Module, rows: Sequence[Example], length: int, pad_token_id: int
) -> dict[str, Any]:
    """Arguments of ``generate``: the shared beginning, then padding, then the rest of each row."""
    device = next(model.parameters()).device
    rest = [without_prefix(row, length) for row in rows]
    batch = collate(rest, [0] * len(rest), pad_token_id)
    ids = batch.input_ids.to(device)
    mask = batch.attention_mask.to(device)
    if not length:
        return {"input_ids": ids, "attention_mask": mask}
    beginning = rows[0].input_ids[:length]
    prefixes = fill_prefixes(model, [beginning], pad_token_id)
    if prefixes is None:
        raise ValueError("greedy_answers: this model's cache is not keys and values only")
    groups = torch.zeros(len(rows), dtype=torch.long, device=device)
    first = torch.as_tensor(beginning, device=device).long().expand(len(rows), -1)
    return {
        "input_ids": torch.cat([first, ids], dim=1),
        "attention_mask": torch.cat([prefixes.mask[groups], mask], dim=1),
        "past_key_values": prefixes.cache(groups),
    }


def all_targets(ids: np.ndarray, first: int) -> Example:
    """A row whose tokens from position ``first`` on are targets."""
    labels = ids.copy()
    labels[:first] = IGNORED_LABEL
    return Example(ids, labels)


def _end_token_ids(model: nn.Module, end_ids: Sequence[int]) -> list[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (*ids, *end_ids) if i is not None})


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in ends:
            return row[: position + 1]
    return row
