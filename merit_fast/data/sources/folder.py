"""Lists what a folder holds by split: saved datasets, clones of the hub, and files of rows."""

import fnmatch
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from merit_fast.data.paths import ROW_SUFFIXES, container_of
from merit_fast.data.sources.card import card_patterns
from merit_fast.data.sources.source import Folder, Source
from merit_fast.data.sources.split_names import divide
from merit_fast.errors import InputError, one_line

_NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_DOCUMENTS = (".md", ".py", ".yml", ".yaml", ".cff", ".bib", ".ipynb", ".lock")
_MEDIA = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg")
_DOCUMENT_NAMES = ("readme", "license", "licence", "copying", "notice", "makefile", "changelog")


@dataclass(frozen=True)
class Listing:
    """Files of rows by split, and the files that are not read."""

    splits: dict[str, list[str]]
    unread: tuple[str, ...] = ()
    is_file: bool = False


def list_folder(folder: Folder, source: Source) -> Listing:
    """Finds the splits of a folder.

    Raises:
        InputError: the folder holds no rows, or its description is broken.
    """
    names = folder.names()
    if "state.json" in names:
        _refuse_config(source, "a dataset of save_to_disk")
        return Listing({"train": _saved(folder, "")})
    if "dataset_dict.json" in names:
        _refuse_config(source, "a dataset of save_to_disk")
        return Listing({split: _saved(folder, f"{split}/") for split in _saved_splits(folder)})
    rows = [name for name in names if is_row_file(name)]
    divided = _divide(folder, source, rows)
    if not any(divided.values()):
        others = not_rows(names)
        hint = f"; not read: {shorten(others)}" if others else ""
        wanted = ", ".join(ROW_SUFFIXES)
        raise InputError(
            f"{source.path}: the directory must hold files of rows ({wanted}), found none{hint}"
        )
    taken = {name for files in divided.values() for name in files}
    left = {*rows, *not_rows(names)} - taken
    return Listing(
        {split: [folder.join(name) for name in files] for split, files in divided.items()},
        tuple(sorted(left)),
    )


def is_row_file(name: str) -> bool:
    """Whether the name is one of a file of rows."""
    return container_of(name) != "" and PurePosixPath(name).name not in _NO_ROWS


def shorten(names: Sequence[str]) -> str:
    """At most three of the names, and the number of the others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob, in which ``*`` stays within one folder and ``**`` does not."""
    parts = PurePosixPath(pattern).parts
    return [name for name in names if _matches(PurePosixPath(name).parts, parts)]


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(name)
        return any(_matches(name[i:], pattern[1:]) for i in range(len(name)))
    return (
        bool(name) and fnmatch.fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])
    )


def _divide(folder: Folder, source: Source, rows: list[str]) -> dict[str, list[str]]:
    """Split -> its files, of what the entry, the card or the names tell."""
    if source.data_files:
        _refuse_config(source, "data_files")
        return {"train": _resolve(folder, source.data_files, rows, "data_files")}
    patterns = card_patterns(folder, source)
    if patterns is None:
        return divide(rows, source.path)
    divided = {}
    for split, globs in patterns.by_split.items():
        divided[split] = _resolve(folder, globs, rows, f"README.md: configs: {patterns.config}")
    return divided or divide(
        [name for name in rows if name.startswith(patterns.data_dir)], source.path
    )


def _resolve(folder: Folder, patterns: Sequence[str], rows: Sequence[str], key: str) -> list[str]:
    files: list[str] = []
    for pattern in patterns:
        found = [name for name in matching(pattern.removeprefix("./"), rows) if name not in files]
        if not found:
            raise InputError(f"{folder.name}: {key}: must match files of rows, got {pattern!r}")
        files += found
    return files


def not_rows(names: Iterable[str]) -> list[str]:
    """Files of a folder that hold neither rows, nor text about them, nor images."""
    return [name for name in names if not is_row_file(name) and not _is_document(name)]


def _is_document(name: str) -> bool:
    last = PurePosixPath(name).name.lower()
    is_named_so = last.startswith(_DOCUMENT_NAMES) or last in (*_NO_ROWS, "state.json")
    return is_named_so or last.endswith((*_DOCUMENTS, *_MEDIA))


def _refuse_config(source: Source, other: str) -> None:
    if source.config is not None:
        raise InputError(
            f"{source.path}: config: must be absent next to {other}, got {source.config!r}"
        )


def _saved(folder: Folder, prefix: str) -> list[str]:
    """The Arrow files of a dataset of ``save_to_disk``, in their order."""
    state = _json(folder, f"{prefix}state.json")
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(
        isinstance(file, dict) and isinstance(file.get("filename"), str) for file in files
    ):
        raise InputError(f"{folder.join(prefix)}state.json: must list _data_files, got {files!r}")
    return [folder.join(prefix + file["filename"]) for file in files]


def _saved_splits(folder: Folder) -> list[str]:
    splits = _json(folder, "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise InputError(f"{folder.join('dataset_dict.json')}: must list splits, got {splits!r}")
    return splits


def _json(folder: Folder, name: str) -> dict[str, Any]:
    try:
        value = json.loads(folder.text(name))
    except ValueError as error:
        raise InputError(f"{folder.join(name)}: must be JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{folder.join(name)}: must be an object, got {type(value).__name__}")
    return value
