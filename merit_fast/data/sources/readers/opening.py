"""Opens a file or a URL as a stream of bytes, decompressed by its suffix."""

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from merit_fast.data.paths import COMPRESSIONS, is_url
from merit_fast.errors import InputError, one_line

_BUFFER = 1 << 18


@contextmanager
def open_stream(name: str) -> Iterator[IO[bytes]]:
    """Opens a file for reading, whatever compression its suffix names.

    Raises:
        InputError: the file cannot be opened or read, its compressed data are broken or cut
            short, or the client of the URL's store is missing; also while the caller reads.
    """
    with open_file(name) as file, reading(name), _decompressed(file, name) as stream:
        yield stream


@contextmanager
def open_file(name: str) -> Iterator[IO[bytes]]:
    """Opens a file or a URL for reading as it lies there.

    Raises:
        InputError: as for ``open_stream``.
    """
    with reading(name):
        if not is_url(name):
            with open(name, "rb") as file:
                yield file
            return
        import fsspec

        with fsspec.open(name, "rb") as file:
            yield file


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what goes wrong while ``name`` is read into one line that names it."""
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise InputError(f"{name}: must be whole compressed data, got: {one_line(error)}") from None
    except ImportError as error:
        raise InputError(f"{name}: needs a client of its store: {one_line(error)}") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{name}: cannot be read: {reason}") from None
    except Exception as error:  # the clients of stores have no common base for their errors
        if isinstance(error, InputError) or not is_url(name):
            raise
        raise InputError(f"{name}: cannot be read: {one_line(error)}") from None


@contextmanager
def _decompressed(file: IO[bytes], name: str) -> Iterator[IO[bytes]]:
    suffix = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    if not suffix and not is_url(name):
        yield file
        return
    if not suffix:  # the files of some stores cannot read a part of a line
        yield io.BufferedReader(cast(Any, file), _BUFFER)
        return
    with cast(IO[bytes], _OPENERS[suffix](file)) as stream:
        yield stream


def _zstandard(file: IO[bytes]) -> io.BufferedReader:
    import pyarrow

    whole = pyarrow.PythonFile(file, mode="r")
    return io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(whole, "zstd")), _BUFFER)


_OPENERS: dict[str, Any] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
