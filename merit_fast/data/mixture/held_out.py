"""Holds out a share of a dataset's rows by their content, where it has no held-out file."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from merit_fast.data.config import DatasetConfig, Part
from merit_fast.data.sources import PlacedRow
from merit_fast.errors import InputError

_BITS = 64


def rows_of_part(
    rows: Iterator[PlacedRow], config: DatasetConfig, part: Part
) -> Iterator[PlacedRow]:
    """Yields the rows of one part: all of them, unless ``eval_share`` divides them.

    Raises:
        InputError: the division leaves this part without a row.
    """
    if config.eval_share is None:
        yield from rows
        return
    is_held_out = holds_out(config.eval_share)
    seen = kept = 0
    for row in rows:
        seen += 1
        if is_held_out(row[1]) == (part == "eval"):
            kept += 1
            yield row
    if seen and not kept:
        raise InputError(
            f"mixture: {config.name}: eval_share: must leave rows on both sides, "
            f"got {config.eval_share:g}, which leaves none of {seen} rows to {part}"
        )


def holds_out(fraction: float) -> Callable[[dict[str, Any]], bool]:
    """A function that tells whether a row is held out.

    It depends on the row's content only: equal rows are on one side, and a row that is added moves
    no other.

        held out = blake2b(JSON of the row) / 2^64 < fraction
    """
    limit = int(fraction * 2**_BITS)

    def is_held_out(row: dict[str, Any]) -> bool:
        text = json.dumps(row, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode(), digest_size=_BITS // 8).digest()
        return int.from_bytes(digest, "big") < limit

    return is_held_out
