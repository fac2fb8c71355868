"""Loads a whole mixture: the rows of each dataset's part, encoded."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.dataset import Dataset, Example
from merit_fast.data.encode import RowEncoder
from merit_fast.data.mixture.scan import check_bad_rows, error_notes, selected_rows
from merit_fast.data.mixture.select import MixtureRows, Selection
from merit_fast.data.sources import Source, read_rows, unread_files
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
    rows: MixtureRows | None = None,
) -> list[Dataset]:
    """Reads and tokenizes the datasets of a mixture, in its order.

    Args:
        configs: the entries of `mixture:`; relative paths are relative to the current directory.
        tokenizer: a fast tokenizer, or a processor that holds one.
        data_config: the `data:` section.
        part: "train", or "eval" for the held-out rows.
        rows: the same mixture's rows, where they are known already.

    Returns:
        One Dataset per entry. For "eval", entries without held-out rows are left out;
        the caller decides whether that matters.

    Raises:
        InputError: two entries share a name, training files hold held-out rows, or a file or row
            is wrong; the message names file and line.
    """
    selections = (rows or MixtureRows(configs, data_config)).select(part)
    datasets = []
    for config in configs:
        if place := source(config, part):
            encoder = RowEncoder(config, data_config, tokenizer)
            selection = selections[config.name]
            datasets.append(_load(config, data_config, encoder, place, selection))
    return datasets


def _load(
    config: DatasetConfig,
    data_config: DataConfig,
    encoder: RowEncoder,
    place: Source,
    selection: Selection,
) -> Dataset:
    of_rows: list[tuple[Example, ...]] = []
    outcomes: Counter[str] = Counter()
    errors = list(selection.errors)
    rows = selected_rows(read_rows(place), selection.rows)
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        for encoded in encoder.encode(chunk):
            if encoded.error:
                errors.append(str(encoded.error))
                check_bad_rows(errors, config, data_config)
            of_rows.append(encoded.examples)
            outcomes.update(encoded.outcomes)
    examples = tuple(example for position in selection.order for example in of_rows[position])
    if not examples:
        rule = f"an answer within data.max_length = {data_config.max_length} tokens"
        where = f"{place.path}: dataset {config.name}"
        raise InputError(f"{where}: must have a row with {rule}, found none in {len(of_rows)} rows")
    notes = (
        *_source_notes(place),
        *_outcome_notes(outcomes, data_config.max_length),
        *encoder.reader.notes(),
        *selection.notes,
        *error_notes(errors),
    )
    return Dataset(config.name, examples, notes)


def _source_notes(place: Source) -> Iterator[str]:
    """A sentence on the files of a folder of which nothing is read."""
    if unread := unread_files(place):
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
