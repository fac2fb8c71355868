"""Lists folders and globs in stores such as s3:// and hf://, through fsspec."""

from __future__ import annotations

from typing import Any

from merit_fast.data.paths import is_glob
from merit_fast.data.sources.readers.opening import open_file, reading
from merit_fast.errors import InputError

_MARKS = ("ETag", "etag", "md5", "checksum", "oid", "LastModified", "last_modified", "mtime")


class StoreFolder:
    """A folder in a store.

    Raises:
        InputError: the store has no such folder, or cannot be asked.
    """

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        store, path = _store(url)
        with reading(url):
            found = [str(file).strip("/") for file in store.find(path)]
        if not found:
            raise InputError(f"{url}: is neither a file nor a folder in its store")
        self._names = sorted(file[len(path.strip("/")) + 1 :] for file in found)

    def names(self) -> list[str]:
        """Paths of all files in it."""
        return [name for name in self._names if not is_hidden(name)]

    def text(self, name: str) -> str:
        """The content of a text file."""
        with open_file(self.join(name)) as file:
            return file.read().decode("utf-8", "replace")

    def join(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.name}/{name}"


def is_hidden(name: str) -> bool:
    """Whether a part of the path begins with a dot, or a folder with two underscores."""
    parts = name.split("/")
    return any(part[:1] == "." for part in parts) or any(part[:2] == "__" for part in parts[:-1])


def is_store_file(url: str) -> bool:
    """Whether the store has a file of this name.

    Raises:
        InputError: the store cannot be asked.
    """
    with reading(url):
        store, path = _store(url)
        return bool(store.isfile(path))


def matching_urls(url: str) -> list[str]:
    """The files of a store that match a glob, sorted.

    Raises:
        InputError: the store cannot be asked.
    """
    parts = url.split("/")
    fixed = "/".join(parts[: next(i for i, part in enumerate(parts) if is_glob(part))])
    with reading(url):
        store, path = _store(url)
        root = _store(fixed)[1].strip("/")
        found = [str(name).strip("/") for name in store.glob(path) if store.isfile(name)]
    return sorted(f"{fixed}/{name[len(root) :].lstrip('/')}" for name in found)


def content_mark(url: str) -> list[str]:
    """A value that changes when the store's file does, as far as the store tells.

    Raises:
        InputError: the store cannot be asked.
    """
    with reading(url):
        store, path = _store(url)
        info = store.info(path)
    return [url, str(info.get("size")), *(f"{key}={info[key]}" for key in _MARKS if key in info)]


def _store(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    with reading(url):
        store, path = url_to_fs(url)
        return store, str(path)
