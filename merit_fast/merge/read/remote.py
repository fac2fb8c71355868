"""Models in object stores: fsspec URLs such as s3://bucket/model in place of directories.

fsspec is imported with the first URL, never for a local path. Credentials, endpoints and retries
are the client's.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from merit_fast.errors import InputError, MeritFastError, one_line

_FIRST_READ = 1 << 20  # bytes; holds most headers, so one request gets length and header
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "content_md5",
    "mtime",
    "created",
    "last_modified",
)


class RemotePath:
    """An object or a prefix of a store, with the methods of ``pathlib.Path`` that a merge uses.

    ``version`` is the object's size and ETag when it was last opened; bytes read by range later are
    of the same version if ``check_unchanged`` passes after them.
    """

    __slots__ = ("path", "store", "url", "version")

    def __init__(self, store: Any, url: str, path: str) -> None:
        self.store = store
        self.url = url
        self.path = path
        self.version: str | None = None

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.store, f"{self.url}/{name}", f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The prefix that holds it; a bucket's is itself."""
        path = self.path.rpartition("/")[0]
        url = self.url.rpartition("/")[0]
        return RemotePath(self.store, url, path) if path else self

    @property
    def parents(self) -> "list[RemotePath]":
        parent = self.parent
        return [] if parent == self else [parent, *parent.parents]

    def resolve(self) -> "RemotePath":
        return self

    def entries(self, fresh: bool = False) -> dict[str, dict[str, Any]]:
        """Name -> the store's entry, of everything directly below; {} if there is nothing.

        Args:
            fresh: ask the store, not fsspec's cache of listings.

        Raises:
            InputError, MeritFastError: the bucket is absent, may not be listed or cannot be
                reached.
        """
        if fresh:
            self.store.invalidate_cache(self.path)
        with told(self):
            try:
                listing = self.store.ls(self.path, detail=True)
            except FileNotFoundError as error:
                if _names_only(error, self.path):
                    return {}
                raise
        inside = [(entry["name"].rstrip("/"), entry) for entry in listing]
        return {
            path.rpartition("/")[2]: entry
            for path, entry in inside
            if path.strip("/") != self.path.strip("/")
        }

    def exists(self) -> bool:
        """Whether its prefix lists it. Asks the store once per prefix, then fsspec's cache."""
        return self.name in self.parent.entries()

    def is_dir(self) -> bool:
        with told(self):
            try:
                return bool(self.store.info(self.path)["type"] == "directory")
            except FileNotFoundError as error:
                if _names_only(error, self.path):
                    return False
                raise

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def open(self) -> BinaryIO:
        """Opens the object for reading in ranges; nothing is read before the first ``read``.

        Raises:
            InputError, MeritFastError: it is no object, or cannot be read.
        """
        with told(self):
            entry = self.store.info(self.path)
        if entry["type"] != "file" or entry.get("size") is None:
            raise InputError(f"{self}: must be an object of known size")
        self.version = version_of(entry)
        return cast(BinaryIO, io.BufferedReader(_Ranges(self, int(entry["size"])), _FIRST_READ))

    def read_text(self, encoding: str = "utf-8") -> str:
        with self.open() as opened:
            return opened.read().decode(encoding)

    def read_range(self, start: int, count: int) -> bytes:
        """Bytes of the object by one request; fewer at its end."""
        with told(self):
            return (
                cast(bytes, self.store.cat_file(self.path, start=start, end=start + count))
                if count
                else b""
            )

    def copy_to(self, target: Path) -> None:
        with told(self):
            self.store.get_file(self.path, str(target))

    def check_unchanged(self) -> None:
        """Refuses an object that changed since it was opened.

        Raises:
            InputError: it changed, or it is gone.
        """
        self.store.invalidate_cache(self.parent.path)
        with told(self):
            version = version_of(self.store.info(self.path))
        if self.version is not None and version != self.version:
            raise InputError(
                f"{self}: must not change while it is read: was {self.version}, is {version}"
            )


Location: TypeAlias = Path | RemotePath


def as_location(text: str | Location) -> Location:
    """A local directory, or the location of an fsspec URL; file:// is a local path.

    Raises:
        InputError: a URL of an unknown kind, or of one whose client is not installed.
    """
    if isinstance(text, (Path, RemotePath)):
        return text
    protocol, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if protocol in ("file", "local"):
        return Path(rest)
    try:
        from fsspec.core import url_to_fs

        url = text.rstrip("/")
        store, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        hint = (
            "; pip install 'merit_fast[s3]'"
            if isinstance(error, ImportError) and protocol.startswith("s3")
            else ""
        )
        raise InputError(f"{text}: {one_line(error)}{hint}") from None
    store.invalidate_cache(path)  # fsspec keeps listings as long as the process lives
    return RemotePath(store, url, path.rstrip("/"))


@contextmanager
def told(path: RemotePath) -> Iterator[None]:
    """Turns any client's error into one line that begins with the URL."""
    try:
        yield
    except MeritFastError:
        raise
    except FileNotFoundError as error:
        reason = "" if _names_only(error, path.path) else f": {one_line(error)}"
        raise InputError(f"{path}: does not exist{reason}") from None
    except PermissionError as error:
        raise InputError(f"{path}: may not be accessed: {one_line(error)}") from None
    except Exception as error:  # each store's client raises its own kinds
        raise MeritFastError(f"{path}: {one_line(error)}") from None


class _Ranges(io.RawIOBase):
    """An object as a raw stream: every read is one request."""

    def __init__(self, path: RemotePath, size: int) -> None:
        self.path = path
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = max(min(len(buffer), self.size - self.at), 0)
        data = self.path.read_range(self.at, count)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def version_of(entry: dict[str, Any]) -> str:
    """Size and ETag, or time, of a store's entry."""
    mark = next((entry[key] for key in _VERSION_KEYS if entry.get(key)), "")
    return f"{entry.get('size')} bytes {mark}".strip()


def _names_only(error: FileNotFoundError, path: str) -> bool:
    """Whether the error only names the absent path; a missing bucket has a message of its own."""
    return str(error.filename or error).strip("/") == path.strip("/") or str(error) == ""
