"""What the other stages see of the data: tokenized examples, gathered by dataset."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized row. It ends with its last target token."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[
        np.int32
    ]  # [T] the same ids, -100 where not in the loss; labels[0] always is -100


@dataclass(frozen=True, eq=False)
class Dataset:
    """One dataset's examples in the order of its rows, and what happened to them on the way in."""

    name: str
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()  # "3 rows longer than 2048 tokens were truncated"

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @cached_property
    def num_target_tokens(self) -> int:
        """Tokens in the loss, after the shift."""
        return sum(count_target_tokens(example.labels) for example in self.examples)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens through the model, without padding."""
        return sum(len(example.input_ids) for example in self.examples)


def count_target_tokens(labels: Any) -> int:
    """Targets that a causal model predicts: ``labels[..., 1:] != -100``, since nothing predicts position 0.

    Args:
        labels: [T] or [B, T], a numpy array or a torch tensor.
    """
    return int((labels[..., 1:] != IGNORED_LABEL).sum())
