"""Tokenized examples, gathered by dataset: the form in which every stage takes the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, overload

import numpy as np
from numpy.typing import NDArray

from merit_fast.kernels.labels import IGNORED_LABEL

if TYPE_CHECKING:
    import torch

__all__ = [
    "IGNORED_LABEL",
    "ChainedExamples",
    "Dataset",
    "Example",
    "Media",
    "Tree",
    "count_target_tokens",
]


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
        """JSON-ready values from which a token store makes the media again; no pixels.

        Args:
            folder: where the bytes of images that are no files go; None: the values hold them.
        """


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized row. It ends with its last target token."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T] input_ids, but IGNORED_LABEL outside the loss and at 0
    tree: Tree | None = None  # None: one text
    media: Media | None = None  # None: text only


class CountedExamples(Protocol):
    """A sequence that knows its examples' sizes without making them."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each example."""

    @property
    def target_counts(self) -> NDArray[np.int64]:
        """[N] tokens in the loss of each example, after the shift by one position."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """[N] number of each example's row in its source, from 0."""

    @property
    def places(self) -> NDArray[np.int64]:
        """[N] numbers that are equal for an example that comes twice."""

    @property
    def tree_indices(self) -> NDArray[np.int64]:
        """[M] the examples that are trees."""

    @property
    def are_plain(self) -> bool:
        """Whether no example has a tree or media."""

    def select(self, indices: NDArray[np.int64]) -> Sequence[Example]:
        """A view of these examples, in this order."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """The examples of one dataset in the order of its rows, and notes about changed rows.

    Attributes:
        examples: a sequence, perhaps CountedExamples too.
        notes: sentences such as "3 rows longer than 2048 tokens were truncated".
        content: fingerprint of the rows' conversations; None: not known without the tokens.
        num_rows: rows of the source, with those that gave no example; None: not known.
        row_numbers: [num_rows] number of each of these rows in its source; None: as counted.
    """

    name: str
    examples: Sequence[Example]
    notes: tuple[str, ...] = ()
    content: str | None = None
    num_rows: int | None = None
    row_numbers: NDArray[np.int64] | None = None

    @property
    def num_examples(self) -> int:
        return len(self.examples)

    @cached_property
    def num_target_tokens(self) -> int:
        """Tokens in the loss, after the shift by one position."""
        return int(self.target_counts.sum())

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that pass through the model, without padding."""
        return int(self.lengths.sum())

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each example."""
        if _is_counted(self.examples):
            return self.examples.lengths
        return np.array([len(example.input_ids) for example in self.examples], np.int64)

    @cached_property
    def target_counts(self) -> NDArray[np.int64]:
        """[N] tokens in the loss of each example, after the shift by one position."""
        if _is_counted(self.examples):
            return self.examples.target_counts
        counts = [count_target_tokens(example.labels) for example in self.examples]
        return np.array(counts, np.int64)

    @property
    def tree_indices(self) -> NDArray[np.int64]:
        """[M] the examples that are trees."""
        if _is_counted(self.examples):
            return self.examples.tree_indices
        return np.flatnonzero([example.tree is not None for example in self.examples])

    @property
    def is_plain(self) -> bool:
        """Whether no example has a tree or media."""
        if _is_counted(self.examples):
            return self.examples.are_plain
        return all(example.tree is None and example.media is None for example in self.examples)

    @property
    def rows(self) -> NDArray[np.int64]:
        """[N] number of each example's row in the part; of each example where that is unknown."""
        if _is_counted(self.examples):
            return self.examples.rows
        return np.arange(len(self.examples))

    @property
    def source_rows(self) -> NDArray[np.int64]:
        """[N] number of each example's row in its source, from 0; as ``rows`` if unknown."""
        return self.rows if self.row_numbers is None else self.row_numbers[self.rows]

    @property
    def places(self) -> NDArray[np.int64]:
        """[N] numbers that are equal for an example that comes twice, where that is known."""
        return self.examples.places if _is_counted(self.examples) else np.arange(len(self.examples))

    def select(self, indices: Sequence[int] | NDArray[np.integer]) -> Dataset:
        """The dataset with these examples only, in this order; without notes."""
        chosen = np.asarray(indices, np.int64)
        if _is_counted(self.examples):
            examples = self.examples.select(chosen)
            return replace(self, examples=examples, notes=())
        return Dataset(self.name, tuple(self.examples[int(i)] for i in chosen))


class ChainedExamples(Sequence[Example]):
    """The examples of several datasets, one after another; none is copied."""

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = datasets
        counts = [dataset.num_examples for dataset in datasets]
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]  # negative indices, and IndexError
        part = self.dataset_of(number)
        examples = self._datasets[part].examples
        return examples[number - int(self._ends[part]) + len(examples)]

    def dataset_of(self, index: int) -> int:
        """Number of the dataset that holds an example."""
        return int(np.searchsorted(self._ends, index, side="right"))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each example."""
        return np.concatenate([np.zeros(0, np.int64), *(d.lengths for d in self._datasets)])

    @cached_property
    def tree_indices(self) -> NDArray[np.int64]:
        """[M] the examples that are trees."""
        firsts = [0, *self._ends[:-1].tolist()]
        pairs = zip(firsts, self._datasets, strict=True)
        return np.concatenate([np.zeros(0, np.int64), *(at + d.tree_indices for at, d in pairs)])

    def shortest(self, count: int) -> list[Example]:
        """The ``count`` examples of the fewest tokens, the shortest first."""
        order = np.argsort(self.lengths, kind="stable")
        return [self[int(index)] for index in order[:count]]


def _is_counted(examples: Any) -> TypeGuard[CountedExamples]:
    return hasattr(examples, "target_counts")


def count_target_tokens(labels: Any) -> int:
    """Counts the targets of a causal model: ``labels[..., 1:] != IGNORED_LABEL``.

    Position 0 is left out, since no position predicts it.

    Args:
        labels: [T] or [B, T], a numpy array or a torch tensor.
    """
    return int((labels[..., 1:] != IGNORED_LABEL).sum())
