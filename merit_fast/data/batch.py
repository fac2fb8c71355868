"""Turns examples into tensors, either padded on the left or packed end to end.

Left padding lines up the ends of the answers, so the head can skip the positions before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from merit_fast.data.dataset import IGNORED_LABEL, Example, count_target_tokens
from merit_fast.data.media import join_media

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """B examples as LongTensors [B, T]; ``dataset_ids`` is [B].

    Only ``attention_mask`` tells padding from text.

    Attributes:
        visible: [B, 1, T, T] bool, the keys that each query sees, where an example is a tree; None:
            a query sees the text before it.
        media: pixel inputs and token types by the names of the model's forward; empty for text.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    dataset_ids: torch.Tensor
    visible: torch.Tensor | None = field(default=None, kw_only=True)
    media: Mapping[str, torch.Tensor] = field(default_factory=dict, kw_only=True)

    @cached_property
    def num_target_tokens(self) -> int:
        """Tokens in the loss, after the shift by one position."""
        return count_target_tokens(self.labels)

    @cached_property
    def logits_to_keep(self) -> int:
        """The smallest n such that the last n positions predict every target; 0 without targets.

        With hidden states or logits [B, n, :] of these positions, all but the last of them predict
        ``labels[:, -n + 1:]``. Models read ``logits_to_keep=0`` as "all".
        """
        columns = (self.labels[:, 1:] != IGNORED_LABEL).any(dim=0).nonzero()
        return int(self.labels.shape[1] - columns[0, 0]) if len(columns) else 0


@dataclass(frozen=True, eq=False)
class PackedBatch(Batch):
    """One row [1, T] of B examples end to end; ``cu_seqlens`` [B + 1] holds their borders."""

    cu_seqlens: torch.Tensor


def collate(
    examples: Sequence[Example],
    dataset_ids: Sequence[int],
    pad_token_id: int,
    *,
    pad_to_multiple_of: int = 8,
) -> Batch:
    """Left-pads examples into one batch.

    Padding has labels IGNORED_LABEL, attention_mask 0 and position_ids 0; text has positions
    0, 1, ... The pad token may also occur in the text, as the end token often does: nothing here
    compares ids with it.

    Args:
        examples: B >= 1 examples.
        dataset_ids: [B] the dataset of each example.
        pad_token_id: the id that fills input_ids.
        pad_to_multiple_of: T is the longest length rounded up to this.

    Raises:
        ValueError: no example, or not one dataset id per example.
    """
    import torch

    if not examples or len(examples) != len(dataset_ids):
        raise ValueError(
            f"collate: needs one dataset id per example, "
            f"got {len(dataset_ids)} for {len(examples)} examples"
        )
    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(examples), width), pad_token_id, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        start = width - len(example.input_ids)
        input_ids[row, start:] = torch.as_tensor(example.input_ids)
        labels[row, start:] = torch.as_tensor(example.labels)
        labels[row, start] = IGNORED_LABEL  # padding must not predict the first token
        attention_mask[row, start:] = 1
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(
        input_ids,
        labels,
        attention_mask,
        position_ids,
        torch.tensor(dataset_ids, dtype=torch.long),
        media=join_media(examples, [width - len(example.input_ids) for example in examples], width),
    )


def pack(examples: Sequence[Example], dataset_ids: Sequence[int]) -> PackedBatch:
    """Lays examples end to end in one row, without padding.

    Each example begins at position 0 and is predicted from its own tokens only.

    Args:
        examples: B >= 1 examples.
        dataset_ids: [B] the dataset of each example.

    Raises:
        ValueError: no example, not one dataset id per example, or an example with tree or media.
    """
    import torch

    if any(example.tree is not None or example.media is not None for example in examples):
        raise ValueError("pack: examples must be plain text, without tree or media")
    if not examples or len(examples) != len(dataset_ids):
        raise ValueError(
            f"pack: needs one dataset id per example, "
            f"got {len(dataset_ids)} for {len(examples)} examples"
        )
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    input_ids = torch.cat([torch.as_tensor(example.input_ids) for example in examples]).long()
    labels = torch.cat([torch.as_tensor(example.labels) for example in examples]).long()
    labels[cu_seqlens[:-1]] = (
        IGNORED_LABEL  # an example must not predict the next one's first token
    )
    position_ids = torch.arange(len(input_ids)) - cu_seqlens[:-1].repeat_interleave(lengths)
    ids = torch.tensor(dataset_ids, dtype=torch.long)
    mask = torch.ones_like(input_ids)
    return PackedBatch(
        input_ids[None], labels[None], mask[None], position_ids[None], ids, cu_seqlens
    )


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills padding: the pad token, else the end token, else 0.

    Padding is masked out everywhere, so any valid id serves.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
