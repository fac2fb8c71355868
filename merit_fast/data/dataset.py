"""Tokenized examples, gathered by dataset: the form in which every stage takes the data."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.kernels.labels import IGNORED_LABEL

__all__ = ["IGNORED_LABEL", "Dataset", "Example", "count_target_tokens"]


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized row. It ends with its last target token."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T] input_ids, but IGNORED_LABEL outside the loss and at 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """The examples of one dataset in the order of its rows, and notes about changed rows."""

    name: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()  # "3 rows longer than 2048 tokens were truncated"

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @cached_property
    def num_target_tokens(self) -> int:
        """Tokens in the loss, after the shift by one position."""
        return sum(count_target_tokens(example.labels) for example in self.examples)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that pass through the model, without padding."""
        return sum(len(example.input_ids) for example in self.examples)


def count_target_tokens(labels: Any) -> int:
    """Counts the targets of a causal model: ``labels[..., 1:] != IGNORED_LABEL``.

    Position 0 is left out, since no position predicts it.

    Args:
        labels: [T] or [B, T], a numpy array or a torch tensor.
    """
    return int((labels[..., 1:] != IGNORED_LABEL).sum())
