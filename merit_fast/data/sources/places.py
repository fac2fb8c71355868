"""Finds the files behind a source, and the split that it asks for."""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from merit_fast.data.paths import COMPRESSIONS, ROW_SUFFIXES, is_glob, is_hub_id, is_url
from merit_fast.data.sources.folder import Listing, is_row_file, list_folder, shorten
from merit_fast.data.sources.source import Source
from merit_fast.data.sources.split_names import canonical, divide
from merit_fast.data.sources.store import (
    StoreFolder,
    is_hidden,
    is_store_file,
    matching_urls,
)
from merit_fast.errors import InputError

READERS = ("json", "csv", "parquet", "arrow", "text")  # load_dataset takes them for a dataset
_PLAIN = re.compile(r"[^\[\]+]+")


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine."""

    name: str

    def names(self) -> list[str]:
        """Paths of all files in it."""
        return sorted(_files_below(self.name, "", ()))

    def text(self, name: str) -> str:
        """The content of a text file."""
        return Path(self.name, name).read_text("utf-8", "replace")

    def join(self, name: str) -> str:
        """The path of a file."""
        return str(Path(self.name, name))


def _files_below(folder: str, at: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of the files below a folder; a link back to a folder above it is not followed.

    Raises:
        InputError: a folder cannot be listed.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as scanned:
            entries = list(scanned)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from None
    for entry in entries:
        name = f"{at}{entry.name}"
        if entry.is_dir() and not is_hidden(f"{entry.name}/"):
            yield from _files_below(entry.path, f"{name}/", (*above, real))
        elif not entry.is_dir() and not is_hidden(entry.name):
            yield name


def files_of(source: Source) -> list[str] | None:
    """Paths or URLs of the files that the source reads, in order; None for a hub id.

    Raises:
        InputError: the path does not exist and cannot be a dataset id, a folder holds no rows, or
            there is no such split.
    """
    listing = list_source(source)
    if listing is None:
        return None
    return [file for split in wanted_splits(source, listing) for file in listing.splits[split]]


def local_files(source: Source) -> list[Path] | None:
    """The files of this machine that the source reads; None for a hub id or a URL.

    Raises:
        InputError: as for ``files_of``.
    """
    path = _local_path(source.path)
    files = None if is_url(path) else files_of(source)
    return None if files is None else [Path(file) for file in files]


def splits_of(source: Source) -> dict[str, list[str]] | None:
    """Split -> its files, by the names of datasets (validation for val, valid and dev).

    None for a hub id, which is not asked. A file that is named by its path has the split train.

    Raises:
        InputError: as for ``files_of``, but for the split.
    """
    listing = list_source(source)
    return None if listing is None else listing.splits


def unread_files(source: Source) -> tuple[str, ...]:
    """Files of a folder that no split holds: of unknown kinds, or of no split by their names."""
    listing = list_source(source)
    return () if listing is None else listing.unread


def list_source(source: Source) -> Listing | None:
    """The files of a source by split; None for a hub id.

    Raises:
        InputError: as for ``files_of``, but for the split.
    """
    path = _local_path(source.path)
    if is_url(path):
        listing = _list_store(path, source)
    elif os.path.isdir(path):
        listing = list_folder(LocalFolder(path), source)
    elif os.path.exists(path):
        listing = _one_file(path)
    elif is_glob(path):
        found = sorted(glob.glob(path, recursive=True))
        listing = _matches(path, [file for file in found if os.path.isfile(file)])
    elif source.path in READERS:
        raise InputError(
            f"{source.path}: path: must be a dataset, and this is a reader of datasets; give the "
            "file of rows as path"
        )
    elif is_hub_id(source.path):
        return None
    else:
        raise InputError(
            f"{source.path}: is neither a file, nor a directory, nor a Hugging Face dataset id"
        )
    _refuse_hub_keys(source, listing)
    return listing


def wanted_splits(source: Source, listing: Listing) -> list[str]:
    """The splits of a listing that ``source.split`` names, each once.

    Raises:
        InputError: the listing has no such split.
    """
    names = list(dict.fromkeys(re.findall(r"[^\s\[\]+:%()]+(?=\s*(?:\[|\+|$))", source.split)))
    if source.any_split and len(listing.splits) == 1:
        return list(listing.splits)
    return [_find(name, source, listing) for name in names or [source.split]]


def is_sliced(split: str) -> bool:
    """Whether the split is an expression such as ``train[:10%]`` or ``train+test``."""
    return _PLAIN.fullmatch(split) is None


def _find(name: str, source: Source, listing: Listing) -> str:
    for split in (name, canonical(name)):
        if split in listing.splits:
            return split
    if listing.is_file:
        rule = "must be absent for one file; splits belong to directories and hub datasets"
        raise InputError(f"{source.path}: split: {rule}, got {name!r}")
    found = ", ".join(
        f"{split} ({shorten([os.path.basename(file) for file in files])})"
        for split, files in listing.splits.items()
    )
    raise InputError(
        f"{source.path}: split: must be one that is there, got {name!r}, found {found}"
    )


def _local_path(path: str) -> str:
    return os.path.expanduser(path.removeprefix("file://"))


def _one_file(path: str) -> Listing:
    if not is_row_file(path):
        raise _unknown_container(path)
    return Listing({"train": [path]}, is_file=True)


def _list_store(url: str, source: Source) -> Listing:
    if is_glob(url.partition("?")[0]) and not url.startswith(("http://", "https://")):
        return _matches(url, matching_urls(url))
    if is_row_file(url.partition("?")[0]) and (
        url.startswith(("http://", "https://")) or is_store_file(url)
    ):
        return Listing({"train": [url]}, is_file=True)
    return list_folder(StoreFolder(url), source)


def _matches(pattern: str, files: list[str]) -> Listing:
    """The files of a glob; names tell the split from the first part with a wildcard on."""
    kept = [file for file in files if is_row_file(file)]
    if not kept:
        found = f"found only {shorten(files)}" if files else "found none"
        raise InputError(f"{pattern}: must match files of rows, {found}")
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if is_glob(part))
    start = sum(len(part) + 1 for part in parts[:fixed])
    divided = divide([file[start:] for file in kept], pattern)
    splits = {split: [pattern[:start] + name for name in names] for split, names in divided.items()}
    taken = {file for names in splits.values() for file in names}
    return Listing(splits, tuple(file for file in files if file not in taken))


def _refuse_hub_keys(source: Source, listing: Listing) -> None:
    keys: dict[str, object] = {"revision": source.revision}
    if listing.is_file:
        keys |= {"config": source.config, "data_files": source.data_files or None}
    for key, value in keys.items():
        if value is not None:
            raise InputError(f"{source.path}: {key}: must be absent for files, got {value!r}")


def _unknown_container(path: str) -> InputError:
    known = f"{', '.join(ROW_SUFFIXES)}, the text files also with {', '.join(COMPRESSIONS)}"
    if path.endswith(".txt"):
        return InputError(f"{path}: must hold rows with prompts and answers ({known}), got text")
    return InputError(
        f"{path}: must be a file of rows ({known}), got {Path(path).suffix or 'none'}"
    )
