"""The files of one dataset's examples: tokens, media, an index of the rest, and meta.json, last."""

import contextlib
import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.store.chunk import DTYPES, WIDTHS, Chunk
from merit_fast.manifests.atomic import write_text

FORMAT_VERSION = 2
META_FILE = "meta.json"
INDEX_FILE = "index.bin"
STREAMED = {"tokens": "tokens.bin", "media": "media.bin"}  # too large to be kept in memory
# Widest numbers first: each column then starts at a multiple of its width.
_INDEX = sorted(
    (name for name in DTYPES if name not in STREAMED),
    key=lambda name: -np.dtype(DTYPES[name]).itemsize,
)


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
    """Collects chunks in memory.

    Args:
        token_dtype: dtype of the tokens, such as "<u2".
    """

    def __init__(self, token_dtype: str) -> None:
        self.token_dtype = token_dtype
        self._arrays: dict[str, list[NDArray[Any]]] = {name: [] for name in DTYPES}

    def append(self, chunk: Chunk) -> None:
        """Adds a chunk at the end."""
        for name, array in chunk.columns.items():
            self._arrays[name].append(array.astype(_stored_dtype(name, self.token_dtype)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The columns as a whole; called once, since the chunks are given up one by one."""
        return {name: self._whole(name) for name in DTYPES}

    def _whole(self, name: str) -> NDArray[Any]:
        empty = np.zeros(_shape(name, 0), _stored_dtype(name, self.token_dtype))
        return np.concatenate([empty, *self._arrays.pop(name)])


class FileColumns(MemoryColumns):
    """Appends tokens and media to their files at once, and writes the other columns at the end.

    Args:
        folder: an empty folder.
        token_dtype: dtype of the tokens, such as "<u2".
    """

    def __init__(self, folder: Path, token_dtype: str) -> None:
        super().__init__(token_dtype)
        self.folder = folder
        self._files = {name: _CheckedFile(folder / file) for name, file in STREAMED.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.abandon()

    def append(self, chunk: Chunk) -> None:
        """Adds a chunk at the end."""
        for name, array in chunk.columns.items():
            if name in self._files:
                self._files[name].write(array.astype(_stored_dtype(name, self.token_dtype)))
            else:
                self._arrays[name].append(array)

    def finish(self, summary: Summary) -> None:
        """Writes the other files; every file is on the disk then."""
        for file in self._files.values():
            file.close()
        index = _CheckedFile(self.folder / INDEX_FILE)
        counts = {}
        try:
            for name in _INDEX:
                array = self._whole(name)
                counts[name] = len(array)
                index.write(array)
            index.close()
        finally:
            index.abandon()
        written = {STREAMED[name]: file for name, file in self._files.items()}
        written[INDEX_FILE] = index
        meta = {
            "version": FORMAT_VERSION,
            "token_dtype": self.token_dtype,
            "files": {name: [file.size, file.check] for name, file in written.items()},
            "counts": counts,
            "num_rows": summary.num_rows,
            "outcomes": dict(sorted(summary.outcomes.items())),
            "errors": summary.errors,
            "notes": summary.notes,
        }
        text = json.dumps({"check": _meta_check(meta), **meta})  # ASCII: names may be no Unicode
        write_text(self.folder / META_FILE, text + "\n")


class _CheckedFile:
    """A file that is written from its start, with its size and checksum."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.check = 0
        self._file = open(path, "wb")  # noqa: SIM115

    def write(self, array: NDArray[Any]) -> None:
        data = array.tobytes()
        self._file.write(data)
        self.size += len(data)
        self.check = zlib.crc32(data, self.check)

    def close(self) -> None:
        """Closes the file; its bytes are on the disk then."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Closes the file, if it is open; the disk may be full, and its bytes are not wanted."""
        with contextlib.suppress(OSError):
            self._file.close()


class DamagedError(Exception):
    """A folder is not a store of this version; the text says why."""


def open_columns(folder: Path, *, verify: bool = False) -> tuple[dict[str, NDArray[Any]], Summary]:
    """Maps a store's files into memory.

    Args:
        folder: a finished store.
        verify: compare the checksums of tokens and media too; else their sizes and the index's
            checksum. StoredExamples compares those of each example that it makes.

    Raises:
        DamagedError: a file is absent, unreadable, cut or changed.
    """
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        if meta["version"] != FORMAT_VERSION:
            raise DamagedError(f"{folder / META_FILE}: is of version {meta['version']}")
        if meta.pop("check") != _meta_check(meta):
            raise DamagedError(f"{folder / META_FILE}: its checksum is another one")
        files = meta["files"]
        index = _open_file(folder / INDEX_FILE, files[INDEX_FILE], True)
        columns = _views(index, meta["counts"])
        for name, file in STREAMED.items():
            dtype = _stored_dtype(name, meta["token_dtype"])
            columns[name] = _open_file(folder / file, files[file], verify).view(dtype)
        counts = Counter(meta["outcomes"])
        return columns, Summary(meta["num_rows"], counts, meta["errors"], meta["notes"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from None


def _stored_dtype(name: str, token_dtype: str) -> str:
    return token_dtype if name == "tokens" else DTYPES[name]


def _meta_check(meta: dict[str, Any]) -> int:
    """Checksum of everything in meta.json but itself."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _views(index: NDArray[np.uint8], counts: dict[str, int]) -> dict[str, NDArray[Any]]:
    """The columns of the index, none of them copied."""
    views = {}
    start = 0
    for name in _INDEX:
        width = WIDTHS.get(name, 1)
        end = start + counts[name] * width * np.dtype(DTYPES[name]).itemsize
        views[name] = index[start:end].view(DTYPES[name]).reshape(_shape(name, counts[name]))
        start = end
    return views


def _open_file(file: Path, entry: tuple[int, int], verify: bool) -> NDArray[np.uint8]:
    size, check = entry
    if file.stat().st_size != size:
        raise DamagedError(f"{file}: must have {size} bytes, has {file.stat().st_size}")
    data = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    if verify and zlib.crc32(data.data) != check:
        raise DamagedError(f"{file}: its checksum is another one")
    return data


def _shape(name: str, count: int) -> tuple[int, ...]:
    return (count, WIDTHS[name]) if name in WIDTHS else (count,)
