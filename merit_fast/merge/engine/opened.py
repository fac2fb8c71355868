"""Open files of a running merge: descriptors or URLs for the engine, checked reads for Python."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES, ITEM_BYTES
from merit_fast.kernels.lazy import np
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.remote import Location, RemotePath


class OpenFiles:
    """Inputs by path, and at most one output; without one, outputs go to addresses of memory."""

    def __init__(self) -> None:
        self.descriptors: dict[Location, int] = {}
        self.remote: list[RemotePath] = []
        self.output = -1
        self.written: Any = None  # merit_fast._C.Written of the output, where somebody follows
        self.kept: dict[object, np.ndarray] = {}  # small results that later chunks need again
        self._failure: MeritFastError | None = None

    def number(self, file: Location) -> int:
        """Number of the file in the engine: its descriptor, or -1 - index of a remote file."""
        return (
            -1 - self.remote.index(file) if isinstance(file, RemotePath) else self.descriptors[file]
        )

    @property
    def remote_read(self) -> Callable[[int, int, int, int], int] | None:
        """The engine's reader of (index, offset, bytes, address); None if all is local."""
        return self._read_remote if self.remote else None

    def raise_remote(self) -> None:
        """Raises the first error of a remote read, if there was one."""
        if self._failure is not None:
            raise self._failure

    def read(self, entry: TensorEntry, first: int, count: int) -> bytes:
        """Bytes of ``count`` elements of an input, counted from the start of its segment."""
        item = ITEM_BYTES[entry.dtype]
        return self.read_bytes(entry, first * item, count * item)

    def read_bytes(self, entry: TensorEntry, first: int, count: int) -> bytes:
        """``count`` bytes of an input, from its byte ``first`` on."""
        start = entry.offset + first
        if isinstance(entry.file, RemotePath):
            data = entry.file.read_range(start, count)
        else:
            data = os.pread(self.descriptors[entry.file], count, start)
        if len(data) != count:
            raise InputError(f"{entry.file}: {entry.name}: the file ends before its header says")
        return data

    def write(self, data: bytes, at: int) -> None:
        """Writes bytes at an offset of the output, or at an address if no output is open."""
        if self.output < 0:
            _fill(at, data)
        else:
            os.pwrite(self.output, data, at)
            if self.written is not None:
                self.written.add(at, len(data))

    def small_array(self, entry: TensorEntry) -> np.ndarray:
        """A whole small tensor (a scale, a factor of an adapter) in float64."""
        values = np.frombuffer(
            self.read(entry, 0, entry.num_elements), FLOAT_DTYPES[entry.dtype][1]
        )
        return to_float64(values, entry.dtype).reshape(entry.shape)

    def _read_remote(self, index: int, offset: int, num_bytes: int, address: int) -> int:
        try:
            data = self.remote[index].read_range(offset, num_bytes)
        except MeritFastError as error:
            self._failure = self._failure or error
            return errno.EIO
        if len(data) != num_bytes:
            return errno.ENODATA
        _fill(address, data)
        return 0


def _fill(address: int, data: bytes) -> None:
    """Copies bytes to an address; a merge of local files into files needs no ctypes."""
    import ctypes

    ctypes.memmove(address, data, len(data))


@contextmanager
def open_files(inputs: Iterable[Location], output: Path | None) -> Iterator[OpenFiles]:
    """Opens every input for reading and the output, created, for writing.

    Raises:
        MeritFastError: one cannot be opened, the block raises an OSError, or a remote input changed
            meanwhile.
    """
    opened = OpenFiles()
    try:
        for file in sorted(set(inputs), key=str):
            if isinstance(file, RemotePath):
                opened.remote.append(file)
            else:
                opened.descriptors[file] = os.open(file, os.O_RDONLY)
        if output is not None:
            opened.output = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        yield opened
        for remote in opened.remote:
            remote.check_unchanged()
    except OSError as error:
        raise MeritFastError(f"{error.filename or output or 'merge'}: {error.strerror}") from None
    finally:
        for descriptor in opened.descriptors.values():
            os.close(descriptor)
        if opened.output >= 0:
            os.close(opened.output)
