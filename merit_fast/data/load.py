"""Loads a whole mixture: the rows of each dataset, encoded, in memory or in a token store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.dataset import Dataset
from merit_fast.data.encode import RowEncoder
from merit_fast.data.images import media_reader
from merit_fast.data.mixture.scan import check_bad_rows, error_notes
from merit_fast.data.mixture.select import MixtureRows, Selection
from merit_fast.data.shares import draw_rows
from merit_fast.data.sources import read_rows
from merit_fast.data.store.build import Draw, TokenStore, build_examples, token_dtype
from merit_fast.data.store.chunk import Chunk
from merit_fast.data.store.examples import StoredExamples
from merit_fast.data.store.files import MemoryColumns, Summary
from merit_fast.data.store.workers import ChunkEncoder
from merit_fast.data.template import outcome_notes
from merit_fast.errors import InputError
from merit_fast.progress import Progress, SilentProgress, Task


def load_mixture(
    configs: Sequence[DatasetConfig],
    tokenizer: Any,
    data_config: DataConfig,
    *,
    part: Part,
    rows: MixtureRows | None = None,
    store: TokenStore | None = None,
    progress: Progress | None = None,
    num_workers: int | None = None,
) -> list[Dataset]:
    """Reads and tokenizes the datasets of a mixture, in its order.

    Args:
        configs: the entries of `mixture:`; relative paths are relative to the current directory.
        tokenizer: a fast tokenizer, or a processor that holds one.
        data_config: the `data:` section.
        part: "train", or "eval" for the held-out rows.
        rows: the same mixture's rows, where they are known already.
        store: keeps the tokens for other processes; None: they stay in memory.
        progress: display of the rows as they are tokenized; None: none.
        num_workers: processes that tokenize, 0: this one. None: one per core for a mixture of
            many rows. The examples do not depend on it.

    Returns:
        One Dataset per entry. For "eval", entries without held-out rows are left out;
        the caller decides whether that matters.

    Raises:
        InputError: two entries share a name, training files hold held-out rows, or a file or row
            is wrong; the message names file and line.
    """
    selections = (rows or MixtureRows(configs, data_config)).select(part)
    present = [config for config in configs if source(config, part)]
    counts = [len(selections[config.name].rows) for config in present]
    if store is not None and store.draw is not None:
        counts = [min(count, store.draw.count) for count in counts]
    with (
        ChunkEncoder(tokenizer, data_config, num_workers) as encoder,
        _RowsShown(progress or SilentProgress(), part, sum(counts)) as shown,
    ):
        loader = _Loader(encoder, tokenizer, data_config, part, store, shown)
        return [loader.load(config, selections[config.name]) for config in present]


class _RowsShown:
    """The display of a part's rows as they are tokenized; none for few rows."""

    _FEW = 1000

    def __init__(self, progress: Progress, part: Part, total: int) -> None:
        self.progress = progress
        self._name = f"tokenize ({part})"
        self._total = total
        self._stored = 0
        self._task: Task | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def skip(self, count: int) -> None:
        """Counts rows that the store holds already."""
        if self._task is None:
            self._stored += count
        else:
            self._task.skip(count)

    def advance(self, count: int, dataset: str) -> None:
        """Counts rows that are tokenized now; the first ones open the display."""
        if self._task is None:
            shown = self.progress if self._total >= self._FEW else SilentProgress()
            self._task = self._stack.enter_context(shown.task(self._name, self._total, "rows"))
            self._task.skip(self._stored)
        self._task.advance(count, dataset)


class _Loader:
    """Loads datasets with one pool of workers."""

    def __init__(
        self,
        encoder: ChunkEncoder,
        tokenizer: Any,
        data_config: DataConfig,
        part: Part,
        store: TokenStore | None,
        shown: _RowsShown,
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.data_config = data_config
        self.part: Part = part
        self.store = store
        self.shown = shown
        vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
        self.token_dtype = token_dtype(vocabulary.values())

    def load(self, config: DatasetConfig, selection: Selection) -> Dataset:
        """The dataset of one entry: each selected row once in the store, then in its order."""
        store = self.store or TokenStore(Path(), {})
        if store.draw is not None and not store.place(config.name, selection.rows).exists():
            return self._load_drawn(config, selection, store.draw)

        is_stored = True

        def make(summary: Summary) -> Iterator[Chunk]:
            nonlocal is_stored
            is_stored = False
            return self._make(config, selection, summary)

        columns, summary = build_examples(
            make,
            store.place(config.name, selection.rows) if self.store else None,
            self.token_dtype,
            self.shown.progress,
            verify=store.verify,
            writes=store.writes,
        )
        if is_stored:
            self.shown.skip(len(selection.rows))
        return self._dataset(config, selection, columns, summary)

    def _load_drawn(self, config: DatasetConfig, selection: Selection, draw: Draw) -> Dataset:
        """The dataset of one entry, with at least the examples that a sketch draws of it."""
        order = draw_rows(selection.content, draw.seed, len(selection.rows))
        taken = 0
        more = draw.count
        while True:
            taken = min(taken + more, len(order))
            positions = np.sort(order[:taken])
            columns = MemoryColumns(self.token_dtype)
            summary = Summary()
            drawn = replace(selection, rows=selection.rows[positions])
            for chunk in self._make(config, drawn, summary):
                summary.add(chunk)
                columns.append(chunk)
            arrays = columns.arrays()
            arrays["rows"] = positions[arrays["rows"]]
            dataset = self._dataset(config, selection, arrays, summary)
            if len(np.unique(dataset.places)) >= draw.count or taken == len(order):
                return dataset
            more = taken  # some rows gave no example

    def _dataset(
        self,
        config: DatasetConfig,
        selection: Selection,
        columns: dict[str, NDArray[Any]],
        summary: Summary,
    ) -> Dataset:
        examples = StoredExamples(columns, media_reader(self.tokenizer))
        indices = _in_order(examples.rows, selection)
        return Dataset(
            config.name,
            examples if indices is None else examples.select(indices),
            tuple(self._notes(summary, selection)),
            selection.content,
            len(selection.rows),
            selection.rows,
        )

    def _make(
        self, config: DatasetConfig, selection: Selection, summary: Summary
    ) -> Iterator[Chunk]:
        """Encodes the selected rows. A row's number is its position in ``selection.rows``."""
        place = source(config, self.part)
        assert place is not None
        row_encoder = RowEncoder(config, self.data_config, self.tokenizer)
        rows = read_rows(place, selection.rows.tolist())
        num_examples = 0
        for chunk, count in self.encoder.chunks(config, row_encoder, rows):
            errors = [*selection.errors, *summary.errors, *chunk.errors]
            check_bad_rows(errors, config, self.data_config)
            num_examples += len(chunk.columns["lengths"])
            yield chunk
            self.shown.advance(count, config.name)
        summary.notes += row_encoder.notes()
        if not num_examples:
            rule = f"an answer within data.max_length = {self.data_config.max_length} tokens"
            where = f"{place.path}: dataset {config.name}"
            raise InputError(
                f"{where}: must have a row with {rule}, found none in {len(selection.rows)} rows"
            )

    def _notes(self, summary: Summary, selection: Selection) -> Iterator[str]:
        yield from outcome_notes(summary.outcomes, self.data_config.max_length)
        yield from summary.notes
        yield from selection.notes
        yield from error_notes([*selection.errors, *summary.errors])


def _in_order(rows: NDArray[np.int64], selection: Selection) -> NDArray[np.int64] | None:
    """[N] the examples of the rows of ``selection.order``; None: all of them, as they come.

    Args:
        rows: the row of every stored example, as a position in ``selection.rows``, ascending.
        selection: the dataset's rows.
    """
    order = selection.order
    if np.array_equal(order, np.arange(len(selection.rows))):
        return None
    first = np.searchsorted(rows, order, side="left")
    counts = np.searchsorted(rows, order, side="right") - first
    starts = np.repeat(first - (np.cumsum(counts) - counts), counts)
    return starts + np.arange(int(counts.sum()))
