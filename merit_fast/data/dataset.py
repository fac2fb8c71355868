"""Tokenized examples, gathered by dataset: the form in which every stage takes the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from merit_fast.kernels.labels import IGNORED_LABEL

if TYPE_CHECKING:
    import torch

__all__ = ["IGNORED_LABEL", "Dataset", "Example", "Media", "Tree", "count_target_tokens"]


@dataclass(frozen=True, eq=False)
class Tree:
    """Texts that share their beginnings, laid out as the runs of tokens of a trie.

    Run k holds tokens ``starts[k]`` up to ``starts[k + 1]`` (up to T for the last) and follows
    run ``parents[k]``, -1 at a root; a parent stands before its children. A token sees its own
    run up to itself and the whole of its ancestors. Its position is its depth:

        depth(first token of k) = depth(last token of parents[k]) + 1

    The first token of a run is a target only where the run stands right behind its parent, so the
    usual shift by one position holds. Runs at the root begin texts that share nothing.
    """

    starts: NDArray[np.int32]  # [R], starts[0] == 0
    parents: NDArray[np.int32]  # [R], parents[0] == -1


class Media(Protocol):
    """The images of one example, possibly none. They are read when a batch is made.

    Every example of a model that reads images has media, and no other example has.
    """

    @property
    def token_types(self) -> NDArray[np.int8]:
        """[T] 0 for text, 1 for an image, 2 for a video."""

    @property
    def token_types_name(self) -> str | None:
        """Name of the token types in the model's forward; None if it takes none."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Pixel inputs by the names of the model's forward; examples are joined along dim 0."""

    def fingerprint(self) -> str:
        """Hex digits of the contents of the images, in their order."""

    def cut(self, length: int) -> Media:
        """The media of the example's first ``length`` tokens."""

    def reference(self, folder: Path | None = None) -> dict[str, Any]:
        """A JSON object that stands for the media; with ``folder``, bytes of images go there."""


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized row. It ends with its last target token."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T] input_ids, but IGNORED_LABEL outside the loss and at 0
    tree: Tree | None = None  # None: one text
    media: Media | None = None  # None: text only


@dataclass(frozen=True, eq=False)
class Dataset:
    """The examples of one dataset in the order of its rows, and notes about changed rows."""

    name: str
    examples: Sequence[Example]
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
        return int(self.lengths.sum())

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each example."""
        return np.array([len(example.input_ids) for example in self.examples], np.int64)

    def select(self, indices: Sequence[int] | NDArray[np.integer]) -> Dataset:
        """The dataset with these examples only, in this order; without notes."""
        return Dataset(self.name, tuple(self.examples[int(i)] for i in indices))


def count_target_tokens(labels: Any) -> int:
    """Counts the targets of a causal model: ``labels[..., 1:] != IGNORED_LABEL``.

    Position 0 is left out, since no position predicts it.

    Args:
        labels: [T] or [B, T], a numpy array or a torch tensor.
    """
    return int((labels[..., 1:] != IGNORED_LABEL).sum())
