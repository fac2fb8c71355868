"""The files of one dataset's examples: one of flat numbers per column, and meta.json, last."""

import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.store.chunk import DTYPES, PER_EXAMPLE, WIDTHS, Chunk
from merit_fast.manifests.atomic import fsync_path, write_text

FORMAT_VERSION = 1
META_FILE = "meta.json"
_BYTES_AT_ONCE = 1 << 24


@dataclass
class Summary:
    """Counts of the rows behind a dataset's examples, and its notes."""

    num_rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)  # of rows that were skipped
    notes: list[str] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        """Counts a chunk's rows."""
        self.num_rows += chunk.num_rows
        self.outcomes.update(chunk.outcomes)
        self.errors += chunk.errors


class MemoryColumns:
    """Collects chunks in memory."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []

    def append(self, chunk: Chunk) -> None:
        """Adds a chunk at the end."""
        self._chunks.append(chunk)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns as a whole."""
        return {
            name: np.concatenate(
                [chunk.columns[name] for chunk in self._chunks]
                or [np.zeros(_shape(name, 0), dtype)]
            )
            for name, dtype in DTYPES.items()
        }


class FileColumns:
    """Appends chunks to the files of a folder.

    Args:
        folder: an empty folder.
        token_dtype: dtype of tokens.bin, such as "<u2".
    """

    def __init__(self, folder: Path, token_dtype: str) -> None:
        self.folder = folder
        self.dtypes = {**DTYPES, "tokens": token_dtype}
        self._files: dict[str, BinaryIO] = {
            name: open(folder / f"{name}.bin", "wb")  # noqa: SIM115
            for name in self.dtypes
        }
        self._sizes = dict.fromkeys(self.dtypes, 0)
        self._checks = dict.fromkeys(self.dtypes, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, chunk: Chunk) -> None:
        """Adds a chunk at the end of every file."""
        for name, array in chunk.columns.items():
            data = np.ascontiguousarray(array, self.dtypes[name]).tobytes()
            self._files[name].write(data)
            self._sizes[name] += len(data)
            self._checks[name] = zlib.crc32(data, self._checks[name])

    def finish(self, summary: Summary) -> None:
        """Writes meta.json; every file is on the disk then."""
        for name, file in self._files.items():
            file.close()
            fsync_path(self.folder / f"{name}.bin")
        meta = {
            "version": FORMAT_VERSION,
            "columns": {
                name: [dtype, self._sizes[name], self._checks[name]]
                for name, dtype in self.dtypes.items()
            },
            "num_rows": summary.num_rows,
            "outcomes": dict(sorted(summary.outcomes.items())),
            "errors": summary.errors,
            "notes": summary.notes,
        }
        write_text(self.folder / META_FILE, json.dumps(meta, ensure_ascii=False) + "\n")


class DamagedError(Exception):
    """A folder is not a store of this version; the text says why."""


def open_columns(folder: Path, *, verify: bool = False) -> tuple[dict[str, NDArray[Any]], Summary]:
    """Maps a store's files into memory; reads the columns of one value an example.

    Args:
        folder: a finished store.
        verify: read every byte and compare checksums; else sizes, and the checksums of the
            columns that are read anyway.

    Raises:
        DamagedError: a file is absent, unreadable, cut or changed.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if meta["version"] != FORMAT_VERSION:
            raise DamagedError(f"{folder / META_FILE}: is of version {meta['version']}")
        columns = {
            name: _open_column(folder / f"{name}.bin", name, meta["columns"][name], verify)
            for name in DTYPES
        }
        counts = Counter(meta["outcomes"])
        return columns, Summary(meta["num_rows"], counts, meta["errors"], meta["notes"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from None


def _open_column(file: Path, name: str, entry: tuple[str, int, int], verify: bool) -> NDArray[Any]:
    dtype, size, check = entry
    if file.stat().st_size != size:
        raise DamagedError(f"{file}: must have {size} bytes, has {file.stat().st_size}")
    if (verify or name in PER_EXAMPLE) and _checksum(file) != check:
        raise DamagedError(f"{file}: its checksum is another one")
    if not size:
        return np.zeros(_shape(name, 0), dtype)
    count = size // (np.dtype(dtype).itemsize * WIDTHS.get(name, 1))
    if name in PER_EXAMPLE:
        return np.fromfile(file, dtype)
    return np.memmap(file, dtype, "r", shape=_shape(name, count))


def _checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while data := stream.read(_BYTES_AT_ONCE):
            value = zlib.crc32(data, value)
    return value


def _shape(name: str, count: int) -> Any:
    return (count, WIDTHS[name]) if name in WIDTHS else count
