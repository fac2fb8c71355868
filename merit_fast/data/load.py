"""Loads a whole mixture: the rows of each dataset's part, encoded."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.dataset import Dataset, Example
from merit_fast.data.encode import RowEncoder
from merit_fast.data.mixture.checks import check_mixture
from merit_fast.data.mixture.held_out import rows_of_part
from merit_fast.data.sources import PlacedRow, Source, read_rows, unread_files
from merit_fast.errors import InputError

_LENGTH_NOTES = {
    "truncated": "truncated",
    "dropped": "dropped",
    "unanswered": "dropped because truncation would leave no answer",
}
_ROWS_AT_ONCE = 64  # tokenized in one call, which runs on all cores


def load_mixture(
    configs: Sequence[DatasetConfig],
    tokenizer: Any,
    data_config: DataConfig,
    *,
    part: Part,
) -> list[Dataset]:
    """Reads and tokenizes the datasets of a mixture, in its order.

    Args:
        configs: the entries of `mixture:`; relative paths are relative to the current directory.
        tokenizer: a fast tokenizer, or a processor that holds one.
        data_config: the `data:` section.
        part: "train", or "eval" for the held-out rows.

    Returns:
        One Dataset per entry. For "eval", entries without held-out rows are left out;
        the caller decides whether that matters.

    Raises:
        InputError: two entries share a name, training files hold held-out rows, or a file or row
            is wrong; the message names file and line.
    """
    check_mixture(configs)
    datasets = []
    for config in configs:
        if selected := source(config, part):
            rows = rows_of_part(read_rows(selected), config, part)
            if part == "train":
                rows = itertools.islice(rows, config.max_examples)
            encoder = RowEncoder(config, data_config, tokenizer)
            datasets.append(_load(config, data_config, encoder, rows, selected))
    return datasets


def _load(
    config: DatasetConfig,
    data_config: DataConfig,
    encoder: RowEncoder,
    rows: Iterator[PlacedRow],
    origin: Source,
) -> Dataset:
    examples: list[Example] = []
    outcomes: Counter[str] = Counter()
    num_rows = 0
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        for encoded in encoder.encode(chunk):
            if encoded.error:
                raise encoded.error
            num_rows += 1
            examples.extend(encoded.examples)
            outcomes.update(encoded.outcomes)
    where = f"{origin.path}: dataset {config.name}"
    if not num_rows:
        raise InputError(f"{where}: must have at least one row, found none")
    if not examples:
        rule = f"an answer within data.max_length = {data_config.max_length} tokens"
        raise InputError(f"{where}: must have a row with {rule}, found none in {num_rows} rows")
    notes = (
        *_source_notes(origin),
        *_outcome_notes(outcomes, data_config.max_length),
        *encoder.reader.notes(),
    )
    return Dataset(config.name, tuple(examples), notes)


def _source_notes(origin: Source) -> Iterator[str]:
    """A sentence on the files of a folder of which nothing is read."""
    if unread := unread_files(origin):
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        yield f"files not read: {', '.join(unread[:3])}{more}"


def _outcome_notes(outcomes: Counter[str], limit: int) -> Iterator[str]:
    noun = "example" if outcomes["rewritten"] else "row"
    for key, outcome in _LENGTH_NOTES.items():
        if count := outcomes[key]:
            subject = f"{count} {noun}" if count == 1 else f"{count} {noun}s"
            verb = "was" if count == 1 else "were"
            yield f"{subject} longer than {limit} tokens {verb} {outcome}"
    if count := outcomes["rewritten"]:
        rows = "row" if count == 1 else "rows"
        yield (
            f"{count} {rows} became one example per answer "
            "because the chat template rewrites earlier turns"
        )
