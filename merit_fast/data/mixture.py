"""Loads a whole mixture: rows, format, template and length policy, in one pass over each file."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merit_fast.data.config import DataConfig, DatasetConfig, Part, source
from merit_fast.data.dataset import IGNORED_LABEL, Dataset, Example, count_target_tokens
from merit_fast.data.formats import Format, find_format
from merit_fast.data.held_out import rows_of_part
from merit_fast.data.sources import PlacedRow, local_files, read_rows
from merit_fast.data.template import ChatEncoder, Rendered
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LENGTH_NOTES = {
    "truncated": "truncated",
    "dropped": "dropped",
    "unanswered": "dropped because truncation would leave no answer",
}
_ROWS_AT_ONCE = 64  # tokenized in one call, which runs on all cores


def load_mixture(
    configs: Sequence[DatasetConfig],
    tokenizer: PreTrainedTokenizerBase,
    data_config: DataConfig,
    *,
    part: Part,
) -> list[Dataset]:
    """Reads and tokenizes the datasets of a mixture, in its order.

    Args:
        configs: the entries of `mixture:`; relative paths are relative to the current directory.
        tokenizer: a fast tokenizer.
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
    encoder = ChatEncoder(tokenizer, data_config.chat_template)
    datasets = []
    for config in configs:
        if selected := source(config, part):
            rows = rows_of_part(read_rows(*selected), config, part)
            if part == "train":
                rows = itertools.islice(rows, config.max_examples)
            datasets.append(_Loader(config.name, data_config, encoder).load(selected[0], rows))
    return datasets


def check_mixture(configs: Sequence[DatasetConfig]) -> None:
    """Checks the rules within and across entries that need no row.

    Raises:
        InputError: two entries share a name, path and eval_path share a file, or local files have
            a split.
    """
    for name, count in Counter(config.name for config in configs).items():
        if count > 1:
            raise InputError(
                f"mixture: name: must differ between datasets, got {name!r} {count} times"
            )
    for config in configs:
        files = local_files(config.path)
        held_out = local_files(config.eval_path) if config.eval_path else None
        eval_is_local = files is not None if config.eval_path is None else held_out is not None
        if config.eval_split is not None and eval_is_local:
            raise _misplaced_split(config, "eval_split", config.eval_split)
        split_is_used = files is None or (config.eval_split is None and not eval_is_local)
        if config.split != "train" and not split_is_used:
            raise _misplaced_split(config, "split", config.split)
        shared = {file.resolve() for file in files or ()} & {
            file.resolve() for file in held_out or ()
        }
        if shared:
            raise InputError(
                f"mixture: {config.name}: eval_path: must hold other files than path, "
                f"got {min(shared)} in both"
            )


def _misplaced_split(config: DatasetConfig, key: str, value: str) -> InputError:
    rule = "must be absent for local files; splits belong to Hugging Face datasets"
    return InputError(f"mixture: {config.name}: {key}: {rule}, got {value!r}")


@dataclass
class _Loader:
    """Loads one dataset and counts what its notes report."""

    name: str
    data_config: DataConfig
    encoder: ChatEncoder
    format: Format | None = None
    unused_columns: set[str] = field(default_factory=set)
    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def load(self, path: str, rows: Iterator[PlacedRow]) -> Dataset:
        examples: list[Example] = []
        while rendered := [
            text for row in itertools.islice(rows, _ROWS_AT_ONCE) for text in self._render(row)
        ]:
            fitted = map(self._fit, self.encoder.encode(rendered), rendered)
            examples.extend(example for example in fitted if example is not None)
        where = f"{path}: dataset {self.name}"
        if not self.num_rows:
            raise InputError(f"{where}: must have at least one row, found none")
        if not examples:
            rule = f"an answer within data.max_length = {self.data_config.max_length} tokens"
            raise InputError(
                f"{where}: must have a row with {rule}, found none in {self.num_rows} rows"
            )
        return Dataset(self.name, tuple(examples), tuple(self._notes()))

    def _render(self, row: PlacedRow) -> list[Rendered]:
        where, columns = row
        self.num_rows += 1
        row_format = find_format(columns, where)
        self.format = self.format or row_format
        if row_format is not self.format:
            raise InputError(
                f"{where}: must be of the kind of the rows before it ({self.format.name}: "
                f"{', '.join(self.format.required)}), got {', '.join(columns)}"
            )
        self.unused_columns |= row_format.unused_columns(columns)
        rendered = self.encoder.render(row_format.convert(columns, where), where)
        if not rendered:
            raise InputError(f"{where}: must have an answer of the assistant, found none")
        if len(rendered) > 1:
            self.counts["rewritten"] += 1
        return rendered

    def _fit(self, example: Example, rendered: Rendered) -> Example | None:
        """Applies `data.too_long`. Returns None for a dropped row; a cut row ends with a target."""
        length = len(example.input_ids)
        limit = self.data_config.max_length
        if length <= limit:
            return example
        if self.data_config.too_long == "error":
            rule = f"must have at most data.max_length = {limit} tokens"
            raise InputError(f"{rendered.where}: {rule}, got {length}")
        if self.data_config.too_long == "drop":
            self.counts["dropped"] += 1
            return None
        labels = example.labels[:limit]
        if not count_target_tokens(labels):
            self.counts["unanswered"] += 1
            return None
        self.counts["truncated"] += 1
        end = int((labels != IGNORED_LABEL).nonzero()[0][-1]) + 1
        return Example(example.input_ids[:end].copy(), labels[:end].copy())

    def _notes(self) -> Iterator[str]:
        noun = "example" if self.counts["rewritten"] else "row"
        limit = self.data_config.max_length
        for key, outcome in _LENGTH_NOTES.items():
            if count := self.counts[key]:
                subject = f"{count} {noun}" if count == 1 else f"{count} {noun}s"
                verb = "was" if count == 1 else "were"
                yield f"{subject} longer than {limit} tokens {verb} {outcome}"
        if count := self.counts["rewritten"]:
            rows = "row" if count == 1 else "rows"
            yield (
                f"{count} {rows} became one example per answer "
                "because the chat template rewrites earlier turns"
            )
        if self.unused_columns:
            yield f"columns not used: {', '.join(sorted(self.unused_columns))}"
