"""Runs a model on rows that begin alike, and computes what they share once.

The rows of one task begin with the same system message and instruction, and a causal model's keys
and values at a position depend on the tokens up to it only. So one pass over the common beginnings
fills a cache, and the rows themselves need their other tokens only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.data import IGNORED_LABEL, Example, collate
from merit_fast.model import model_inputs

_WORTHWHILE = 0.2  # share of all tokens that must be saved
_TRIAL_ROWS = 4
# Largest difference of a row's loss from the plain pass, in nats per target token.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Keys and values of G beginnings, padded on the left to P positions."""

    layers: tuple[tuple[Tensor, Tensor], ...]  # of every layer, [G, heads, P, width]
    mask: Tensor  # [G, P]
    lengths: Tensor  # [G]

    def cache(self, groups: Tensor) -> Any:
        """A new cache whose rows begin with the prefixes of ``groups`` [B]."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys[groups], values[groups], number)
        return cache

    def extend(self, inputs: dict[str, Any], groups: Tensor) -> dict[str, Any]:
        """The forward's arguments for rows without their prefixes, with the prefixes put back."""
        mask = torch.cat([self.mask[groups], inputs["attention_mask"]], dim=1)
        return inputs | {
            "attention_mask": mask,
            "position_ids": inputs["position_ids"] + self.lengths[groups][:, None],
            "past_key_values": self.cache(groups),
            "use_cache": True,
        }


def shared_length(rows: Sequence[Example]) -> int:
    """Tokens with which all rows begin, no target and no last token among them."""
    if len(rows) < 2:
        return 0
    first = rows[0].input_ids
    length = min(_first_target(row) for row in rows) - 1
    for row in rows[1:]:
        length = min(length, len(row.input_ids) - 1)
        different = (row.input_ids[:length] != first[:length]).nonzero()[0]
        length = int(different[0]) if len(different) else length
    return max(0, length)


def is_worthwhile(groups: Sequence[Sequence[Example]]) -> bool:
    """Whether the rows of the groups share enough of their tokens, and all are plain text.

    The positions of text behind images depend on the images, so a cache of text does not fit. A
    tree holds its texts' common beginning once already.
    """
    if any(row.media is not None or row.tree is not None for rows in groups for row in rows):
        return False
    saved = sum((len(rows) - 1) * shared_length(rows) for rows in groups)
    return saved >= _WORTHWHILE * sum(len(row.input_ids) for rows in groups for row in rows)


def without_prefix(row: Example, length: int) -> Example:
    """The row from its position ``length`` on."""
    return Example(row.input_ids[length:], row.labels[length:]) if length else row


def fill_prefixes(model: nn.Module, prefixes: Sequence[Any], pad_token_id: int) -> Prefixes | None:
    """Runs the model on token ids of G beginnings; None if its cache is not keys and values only.

    An empty beginning is allowed where another is longer.
    """
    from transformers.cache_utils import DynamicLayer

    rows = [Example(ids, ids) if len(ids) else Example(*_one_pad(pad_token_id)) for ids in prefixes]
    batch = collate(rows, [0] * len(rows), pad_token_id, pad_to_multiple_of=1)
    inputs, _ = model_inputs(model, batch)
    if "position_ids" not in inputs or "logits_to_keep" not in inputs:
        return None
    with torch.inference_mode():
        output = model(**inputs | {"use_cache": True, "logits_to_keep": 1})
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    device = inputs["input_ids"].device
    lengths = torch.tensor([len(ids) for ids in prefixes], device=device)
    mask = inputs["attention_mask"] * (lengths > 0)[:, None]
    return Prefixes(tuple((layer.keys, layer.values) for layer in layers), mask, lengths)


def agrees(plain: Tensor, shared: Tensor, tokens: Tensor, dtype: torch.dtype) -> bool:
    """Whether the rows' summed losses of two passes are equal up to the rounding of ``dtype``."""
    return bool(((plain - shared).abs() <= _TOLERANCE.get(dtype, 0.0) * tokens).all())


def trial_rows(groups: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
    """A few rows of each of the two groups that share most; one pads the other."""
    ranked = sorted(groups, key=lambda rows: -(len(rows) - 1) * shared_length(rows))
    return [rows[:_TRIAL_ROWS] for rows in ranked[:2]]


def _first_target(row: Example) -> int:
    targets = (row.labels[1:] != IGNORED_LABEL).nonzero()[0]
    return int(targets[0]) + 1 if len(targets) else len(row.input_ids)


def _one_pad(pad_token_id: int) -> tuple[Any, Any]:
    import numpy as np

    return np.array([pad_token_id], np.int32), np.array([IGNORED_LABEL], np.int32)
