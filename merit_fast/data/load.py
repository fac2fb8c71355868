"""Loads a whole mixture: the rows of each dataset, encoded, in memory or in a token store."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.dataset import Dataset, Media
from merit_fast.data.encode import RowEncoder
from merit_fast.data.mixture.checks import check_mixture
from merit_fast.data.mixture.held_out import rows_of_part
from merit_fast.data.sources import PlacedRow, read_rows
from merit_fast.data.store.build import TokenStore, build_examples, token_dtype
from merit_fast.data.store.chunk import Chunk
from merit_fast.data.store.examples import StoredExamples
from merit_fast.data.store.files import Summary
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
    check_mixture(configs)
    shown = SilentProgress() if progress is None else progress
    with ChunkEncoder(tokenizer, data_config, num_workers) as encoder:
        loader = _Loader(encoder, tokenizer, data_config, part, store, shown)
        return [loader.load(config) for config in configs if source(config, part)]


class _Loader:
    """Loads datasets with one pool of workers."""

    def __init__(
        self,
        encoder: ChunkEncoder,
        tokenizer: Any,
        data_config: DataConfig,
        part: Part,
        store: TokenStore | None,
        progress: Progress,
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.data_config = data_config
        self.part: Part = part
        self.store = store
        self.progress = progress
        vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
        self.token_dtype = token_dtype(vocabulary.values())

    def load(self, config: DatasetConfig) -> Dataset:
        """The dataset of one entry."""
        store = self.store or TokenStore(Path(), {})
        place = store.place(config.name) if self.store else None

        def make(summary: Summary) -> Iterator[Chunk]:
            return self._make(config, summary)

        columns, summary = build_examples(
            make,
            place,
            self.token_dtype,
            self.progress,
            verify=store.verify,
            writes=store.writes,
        )
        return Dataset(
            config.name,
            StoredExamples(columns, _read_media),
            tuple(self._notes(summary)),
            store.fingerprints.get(config.name),
            summary.num_rows + len(summary.errors),
        )

    def _make(self, config: DatasetConfig, summary: Summary) -> Iterator[Chunk]:
        """Encodes the rows; checks them at the end, so that no store holds a bad dataset."""
        row_encoder = RowEncoder(config, self.data_config, self.tokenizer)
        num_examples = 0
        with self._task(config) as task:
            for chunk, count in self.encoder.chunks(config, row_encoder, self._rows(config)):
                self._check_errors(config, [*summary.errors, *chunk.errors])
                num_examples += len(chunk.columns["lengths"])
                yield chunk
                task.advance(count)
        summary.notes += row_encoder.notes()
        where = f"{self._path(config)}: dataset {config.name}"
        if not summary.num_rows:
            raise InputError(f"{where}: must have at least one row, found none")
        if not num_examples:
            rule = f"an answer within data.max_length = {self.data_config.max_length} tokens"
            raise InputError(
                f"{where}: must have a row with {rule}, found none in {summary.num_rows} rows"
            )

    def _rows(self, config: DatasetConfig) -> Iterator[PlacedRow]:
        selected = source(config, self.part)
        assert selected is not None
        rows = rows_of_part(read_rows(*selected), config, self.part)
        return itertools.islice(rows, config.max_examples) if self.part == "train" else rows

    def _path(self, config: DatasetConfig) -> str:
        selected = source(config, self.part)
        assert selected is not None
        return selected[0]

    @contextlib.contextmanager
    def _task(self, config: DatasetConfig) -> Iterator[Task]:
        """The display of a dataset's rows. Counting them reads each once more, without tokens."""
        if isinstance(self.progress, SilentProgress):
            yield self.progress
            return
        num_rows = sum(1 for _ in self._rows(config))
        with self.progress.task(f"tokenize {config.name}", num_rows, "rows") as task:
            yield task

    def _check_errors(self, config: DatasetConfig, errors: Sequence[str]) -> None:
        limit = self.data_config.bad_rows
        if len(errors) <= limit:
            return
        if not limit:
            raise InputError(errors[0])
        raise InputError(
            f"{self._path(config)}: dataset {config.name}: must have at most data.bad_rows = "
            f"{limit} wrong rows, got {len(errors)} or more; the last: {errors[-1]}"
        )

    def _notes(self, summary: Summary) -> Iterator[str]:
        yield from outcome_notes(summary.outcomes, self.data_config.max_length)
        yield from summary.notes
        if count := len(summary.errors):
            rows = "row was" if count == 1 else "rows were"
            yield f"{count} wrong {rows} skipped; the first: {summary.errors[0]}"


def _read_media(reference: Mapping[str, Any]) -> Media:
    raise ValueError(f"data: media of unknown kind: {sorted(reference)}")
