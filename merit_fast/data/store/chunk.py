"""Some rows' examples as flat arrays: the form in which they are written and cross processes."""

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.dataset import IGNORED_LABEL, Example
from merit_fast.data.encode import EncodedRow

# One value an example; the *_counts hold an example's number of entries in a column below.
PER_EXAMPLE = {
    "lengths": "<u4",  # tokens
    "targets": "<u4",  # tokens in the loss, after the shift
    "rows": "<i8",  # number of the row in the source, from 0
    "span_counts": "<u4",
    "run_counts": "<u4",
    "media_counts": "<u4",
    "checks": "<u4",  # checksum of the tokens and the media
}
RAGGED = {
    "tokens": "<u4",
    "spans": "<u4",  # pairs: first token and number of tokens of a run of targets
    "runs": "<i4",  # pairs: start and parent of a run of a tree
    "media": "u1",  # JSON of the media's reference
}
DTYPES = {**PER_EXAMPLE, **RAGGED}
COUNT_OF = {
    "tokens": "lengths",
    "spans": "span_counts",
    "runs": "run_counts",
    "media": "media_counts",
}
WIDTHS = {"spans": 2, "runs": 2}  # numbers of one entry; 1 for the other columns


@dataclass(frozen=True, eq=False)
class Chunk:
    """The examples of consecutive rows.

    Attributes:
        columns: arrays by the names of ``DTYPES``; those with a width are [entries, width].
        num_rows: rows that were read well.
        outcomes: counts of ``EncodedRow.outcomes``.
        errors: one line for every bad row.
    """

    columns: dict[str, NDArray[Any]]
    num_rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.columns["tokens"])


def pack_rows(rows: Sequence[EncodedRow], first_row: int) -> Chunk:
    """Flattens encoded rows.

    Args:
        rows: the rows, in their order.
        first_row: number of the first of them in its source.

    Raises:
        ValueError: a label in the loss differs from its token.
    """
    outcomes: Counter[str] = Counter()
    errors = []
    examples: list[Example] = []
    numbers = []
    for number, row in enumerate(rows, first_row):
        if row.error:
            errors.append(str(row.error))
            continue
        outcomes.update(row.outcomes)
        examples += row.examples
        numbers += [number] * len(row.examples)
    spans = [_target_spans(example) for example in examples]
    runs = [_tree_runs(example) for example in examples]
    media = [_media_bytes(example) for example in examples]
    targets = [int(pairs[:, 1].sum()) - int(len(pairs) > 0 and pairs[0, 0] == 0) for pairs in spans]
    columns: dict[str, Any] = {
        "lengths": [len(example.input_ids) for example in examples],
        "targets": targets,
        "rows": numbers,
        "span_counts": [len(pairs) for pairs in spans],
        "run_counts": [len(pairs) for pairs in runs],
        "media_counts": [len(reference) for reference in media],
        "checks": [
            content_check(example.input_ids, reference)
            for example, reference in zip(examples, media, strict=True)
        ],
        "tokens": _joined([example.input_ids for example in examples], 1),
        "spans": _joined(spans, 2),
        "runs": _joined(runs, 2),
        "media": _joined(media, 1),
    }
    arrays = {name: np.asarray(columns[name], dtype) for name, dtype in DTYPES.items()}
    return Chunk(arrays, len(rows) - len(errors), outcomes, tuple(errors))


def content_check(tokens: NDArray[Any], media: NDArray[np.uint8]) -> int:
    """CRC-32 of an example's tokens and of the reference of its media."""
    return zlib.crc32(media.tobytes(), zlib.crc32(tokens.astype("<u4").tobytes()))


def _target_spans(example: Example) -> NDArray[Any]:
    """[S, 2] first token and number of tokens of every run of targets."""
    in_loss = example.labels != IGNORED_LABEL
    if not np.array_equal(example.labels[in_loss], example.input_ids[in_loss]):
        raise ValueError("store: every label in the loss must be the token at its place")
    edges = np.flatnonzero(np.diff(in_loss, prepend=False, append=False))
    starts = edges[::2]
    return np.stack([starts, edges[1::2] - starts], axis=1)


def _tree_runs(example: Example) -> NDArray[Any]:
    if example.tree is None:
        return np.zeros((0, 2), np.int32)
    return np.stack([example.tree.starts, example.tree.parents], axis=1)


def _media_bytes(example: Example) -> NDArray[np.uint8]:
    if example.media is None:
        return np.zeros(0, np.uint8)
    text = json.dumps(example.media.reference(), sort_keys=True)
    return np.frombuffer(text.encode(), np.uint8)


def _joined(arrays: Sequence[NDArray[Any]], width: int) -> NDArray[Any]:
    if arrays:
        return np.concatenate(arrays)
    return np.zeros(0 if width == 1 else (0, width), np.int64)
