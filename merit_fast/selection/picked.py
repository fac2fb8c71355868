"""Picks the rows nearest to a target and writes them as they came, with their scores."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from merit_fast.data.config import DatasetConfig, Part, source
from merit_fast.data.sources import local_files
from merit_fast.errors import InputError, show
from merit_fast.export.messages import ImageFiles
from merit_fast.export.rows import ExportRow, PartRows
from merit_fast.export.write import joined, row_text
from merit_fast.manifests.atomic import write_bytes
from merit_fast.pipeline.config import RunConfig
from merit_fast.row_store.checkpoints import Measure
from merit_fast.row_store.hits import Hit
from merit_fast.row_store.rows import Rows
from merit_fast.row_store.target import Weight

_ADDED = ("dataset", "row", "score", "error")
_PARTS: tuple[Part, ...] = ("train", "eval")


def read_keep(text: str) -> int | float:
    """Reads ``--keep``: N rows, or P% of them as a share.

    Raises:
        InputError: it is neither.
    """
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 < share <= 1:
                return share
        elif int(text) >= 1:
            return int(text)
    except ValueError:
        pass
    raise InputError(f"--keep: must be N of at least 1, or P% up to 100%, found {show(text)}")


def num_candidates(rows: Rows, own: str | None) -> int:
    """Number of stored rows that may be picked: all but the target's own."""
    return sum(rows.dataset(name).num_rows for name in rows.datasets if name != own)


def num_kept(keep: int | float, candidates: int) -> int:
    """Number of rows to keep: a share is rounded up.

    Raises:
        InputError: there are no candidates.
    """
    if not candidates:
        raise InputError("--target: must leave rows of other datasets, found none")
    count = keep if isinstance(keep, int) else math.ceil(keep * candidates - 1e-9)
    return min(count, candidates)


def pick_rows(rows: Rows, target: str | Rows, count: int, by: Measure, weight: Weight) -> list[Hit]:
    """The best ``count`` rows, each once by its best example."""
    wanted = count
    while True:
        hits = rows.search(target, wanted, by, weight)
        best: dict[tuple[str, int], Hit] = {}
        for hit in hits:
            best.setdefault((hit.dataset, hit.row), hit)
        if len(best) >= count or len(hits) < wanted:
            return list(best.values())[:count]
        wanted *= 2  # some rows gave several examples


def check_out(out: Path, config: RunConfig, others: Iterable[DatasetConfig]) -> None:
    """Refuses an output file that cannot be written or that rows are read from.

    Raises:
        InputError: the path is a folder, lies in none, or is a file of rows.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"--out: must be a file in an existing folder, found {out}")
    for entry in (*config.mixture, *others):
        for part in _PARTS:
            place = source(entry, part)
            files = local_files(place) if place else None
            if out.resolve() in {file.resolve() for file in files or ()}:
                raise InputError(f"--out: must not be a file of rows ({entry.name}), found {out}")


def write_picked(out: Path, hits: Sequence[Hit], config: RunConfig) -> None:
    """Writes the picked rows by falling score.

        {ROW AS IT CAME, "dataset": NAME, "row": NUMBER, "score": SCORE, "error": ERROR}

    A column that rows have already keeps its value; the added one then has merit_ before its name.

    Raises:
        InputError: the source is no longer as it was sketched.
    """
    texts: dict[tuple[str, int], bytes] = {}
    columns: set[str] = set()
    folder = out.absolute().parent / f"{out.stem}_images"
    for entry in config.mixture:
        numbers = tuple(sorted(hit.row for hit in hits if hit.dataset == entry.name))
        images = ImageFiles(entry.media, folder, folder)
        for row in PartRows(entry, config.data, "train", numbers) if numbers else ():
            texts[row.dataset, row.number] = _text(row, images)
            columns |= row.columns.keys()
    names = [_free(name, columns) for name in _ADDED]
    lines = [
        joined(texts[hit.dataset, hit.row], dict(zip(names, _values(hit), strict=True)))
        for hit in hits
    ]
    write_bytes(out, b"".join(line + b"\n" for line in lines))


def _text(row: ExportRow, images: ImageFiles) -> bytes:
    return row_text(row, images).strip()


def _values(hit: Hit) -> list[Any]:
    return [hit.dataset, hit.row, hit.score, hit.error]


def _free(name: str, columns: set[str]) -> str:
    while name in columns:
        name = f"merit_{name}"
    return name
