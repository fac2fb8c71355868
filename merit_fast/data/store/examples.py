"""A sequence of examples over flat arrays; an example is made when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.dataset import IGNORED_LABEL, Example, Media, Tree
from merit_fast.data.store.chunk import COUNT_OF, content_check
from merit_fast.errors import InputError

ReadMedia = Callable[[Mapping[str, Any]], Media]


class StoredExamples(Sequence[Example]):
    """Examples of a store, or a selection of them that copies no token.

    Args:
        columns: the columns of ``chunk.DTYPES``, as arrays or memory maps.
        read_media: makes an example's media from its reference; None: the store has none.
        indices: [N] the examples of this view; None: all of them.
    """

    def __init__(
        self,
        columns: Mapping[str, NDArray[Any]],
        read_media: ReadMedia | None = None,
        indices: NDArray[np.int64] | None = None,
    ) -> None:
        self._columns = columns
        self._read_media = read_media
        self._indices = indices
        self._bounds = {column: _bounds(columns[count]) for column, count in COUNT_OF.items()}

    def __len__(self) -> int:
        return len(self._columns["lengths"] if self._indices is None else self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> StoredExamples: ...
    def __getitem__(self, index: int | slice) -> Example | StoredExamples:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        number = range(len(self))[index]  # negative indices, and IndexError
        return self._example(number if self._indices is None else int(self._indices[number]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int] | NDArray[np.integer]) -> StoredExamples:
        """A view of these examples in this order; an index may come more than once."""
        chosen = np.asarray(indices, np.int64)
        if self._indices is not None:
            chosen = self._indices[chosen]
        view = StoredExamples.__new__(StoredExamples)
        view.__dict__.update(self.__dict__, _indices=chosen)
        return view

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[N] tokens of each example."""
        return self._per_example("lengths")

    @property
    def target_counts(self) -> NDArray[np.int64]:
        """[N] tokens in the loss of each example, after the shift by one position."""
        return self._per_example("targets")

    @property
    def rows(self) -> NDArray[np.int64]:
        """[N] number of each example's row in its source, from 0."""
        return self._per_example("rows")

    @property
    def are_plain(self) -> bool:
        """Whether no example has a tree or media."""
        return not any(self._per_example(name).any() for name in ("run_counts", "media_counts"))

    @property
    def places(self) -> NDArray[np.int64]:
        """[N] place of each example in the store: equal for an example that comes twice."""
        return np.arange(len(self)) if self._indices is None else self._indices

    @property
    def tree_indices(self) -> NDArray[np.int64]:
        """[M] the examples that are trees."""
        return np.flatnonzero(self._per_example(COUNT_OF["runs"]))

    def last_answer_ids(self, max_length: int) -> NDArray[np.int64]:
        """[U] distinct ids with which answers end before position ``max_length``, ascending."""
        spans = np.asarray(self._columns["spans"], np.int64)
        counts = self._columns[COUNT_OF["spans"]].astype(np.int64)
        example = np.repeat(np.arange(len(counts)), counts)
        ends = spans[:, 0] + spans[:, 1]
        chosen = ends < max_length
        if self._indices is not None:
            in_view = np.zeros(len(counts), bool)
            in_view[self._indices] = True
            chosen &= in_view[example]
        last = self._bounds["tokens"][example[chosen]] + ends[chosen] - 1
        return np.unique(self._columns["tokens"][last]).astype(np.int64)

    def _per_example(self, name: str) -> NDArray[np.int64]:
        values = self._columns[name].astype(np.int64)
        return values if self._indices is None else values[self._indices]

    def _example(self, number: int) -> Example:
        input_ids = self._entries("tokens", number).astype(np.int32)
        reference = self._entries("media", number)
        if content_check(input_ids, reference) != self._columns["checks"][number]:
            raise InputError(self._damage(number))
        labels = np.full(len(input_ids), IGNORED_LABEL, np.int32)
        for start, count in self._entries("spans", number).tolist():
            labels[start : start + count] = input_ids[start : start + count]
        runs = np.array(self._entries("runs", number), np.int32)
        tree = Tree(runs[:, 0].copy(), runs[:, 1].copy()) if len(runs) else None
        return Example(input_ids, labels, tree, self._media(reference))

    def _damage(self, number: int) -> str:
        """The error of an example that has changed since it was stored."""
        file = getattr(self._columns["tokens"], "filename", None)
        place = "memory" if file is None else file.parent
        rule = "must have the checksum of its index, has another one"
        return f"{place}: example {number}: {rule}; remove the folder, and its rows are read again"

    def _media(self, reference: NDArray[np.uint8]) -> Media | None:
        if not len(reference):
            return None
        if self._read_media is None:
            raise ValueError("StoredExamples: read_media must be given for examples with media")
        return self._read_media(json.loads(reference.tobytes()))

    def _entries(self, column: str, number: int) -> NDArray[Any]:
        bounds = self._bounds[column]
        return self._columns[column][bounds[number] : bounds[number + 1]]


def _bounds(counts: NDArray[Any]) -> NDArray[np.int64]:
    bounds = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=bounds[1:])
    return bounds
