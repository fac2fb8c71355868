"""Builds or opens the examples of one dataset; a finished folder is complete and never changes."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.store.chunk import Chunk
from merit_fast.data.store.files import (
    META_FILE,
    DamagedError,
    FileColumns,
    MemoryColumns,
    Summary,
    open_columns,
)
from merit_fast.errors import write_error
from merit_fast.manifests.atomic import fsync_path
from merit_fast.manifests.locks import LOCKS_FOLDER, exclusive, this_process
from merit_fast.progress import Progress

Columns = dict[str, NDArray[Any]]
# Fills the summary's notes when it has yielded every chunk.
MakeChunks = Callable[[Summary], Iterable[Chunk]]


@dataclass(frozen=True)
class Draw:
    """The rows that a sketch draws.

    Attributes:
        count: examples of each dataset; fewer where it has fewer.
        seed: seed of the draw.
    """

    count: int
    seed: int


@dataclass(frozen=True)
class TokenStore:
    """The folder in which tokenized datasets are kept.

    Attributes:
        folder: has a subfolder for each fingerprint, with one for each choice of rows.
        fingerprints: dataset name -> fingerprint of its examples (``dataset_fingerprints``).
        verify: compare every byte with its checksum before it is used.
        writes: False: uses the datasets that are there, and keeps others in memory.
        draw: tokenizes only the rows that a sketch draws of datasets that are not there, and keeps
            these in memory; None: all rows.
    """

    folder: Path
    fingerprints: Mapping[str, str]
    verify: bool = False
    writes: bool = True
    draw: Draw | None = None

    def place(self, name: str, rows: NDArray[np.int64]) -> Path:
        """The folder of a dataset's examples.

        Args:
            name: the dataset's name.
            rows: numbers of the rows of its source that are encoded: the choice may depend on the
                other datasets.
        """
        chosen = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        return self.folder / self.fingerprints[name] / chosen[:16]


def build_examples(
    make: MakeChunks,
    place: Path | None,
    token_dtype: str,
    progress: Progress,
    *,
    verify: bool = False,
    writes: bool = True,
) -> tuple[Columns, Summary]:
    """Opens the examples in ``place``, or makes them.

    A folder that is damaged is made again, and a note says so. One process makes a folder, others
    wait for it. A killed process leaves ``place.tmp``, which the next one replaces.

    Args:
        make: yields the dataset's chunks in order.
        place: the dataset's folder; None: the examples stay in memory.
        token_dtype: dtype of the tokens, such as "<u2".
        progress: display of the note.
        verify: compare every byte of ``place`` with its checksum.
        writes: False: make no folder.
    """
    found = None if place is None else _open(place, verify)
    if found is not None:
        return found
    if place is None or not writes:
        columns = MemoryColumns(token_dtype)
        summary = Summary()
        for chunk in make(summary):
            summary.add(chunk)
            columns.append(chunk)
        return columns.arrays(), summary
    with _locked(place):
        found = _open(place, verify, progress)  # another process may have made it meanwhile
        if found is None:
            _write(make, place, token_dtype)
            found = open_columns(place)
    return found


def token_dtype(vocabulary: Iterable[int]) -> str:
    """The narrowest dtype that holds these token ids."""
    return "<u2" if max(vocabulary, default=0) <= np.iinfo(np.uint16).max else "<u4"


def _open(
    place: Path, verify: bool, progress: Progress | None = None
) -> tuple[Columns, Summary] | None:
    if not place.exists():
        return None
    try:
        return open_columns(place, verify=verify)
    except DamagedError as error:
        if progress is not None:
            progress.note(f"{error}; its rows are tokenized again")
        return None


@contextlib.contextmanager
def _locked(place: Path) -> Any:
    folder = place.parent
    try:
        parents = (folder, folder.parent, folder.parent.parent)
        new = [path for path in parents if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / LOCKS_FOLDER / place.name, this_process("")):
            yield
    except OSError as error:
        raise write_error(place, error) from None
    finally:
        for path in new:  # what stays empty because a row is wrong
            with contextlib.suppress(OSError):
                path.rmdir()


def _write(make: MakeChunks, place: Path, token_dtype: str) -> None:
    temporary = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    summary = Summary()
    try:
        with FileColumns(temporary, token_dtype) as columns:
            for chunk in make(summary):
                summary.add(chunk)
                columns.append(chunk)
            columns.finish(summary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(temporary)
    if place.exists():
        (place / META_FILE).unlink(missing_ok=True)  # a crash now leaves a folder that is damaged
        shutil.rmtree(place)
    os.rename(temporary, place)
    fsync_path(place.parent)
