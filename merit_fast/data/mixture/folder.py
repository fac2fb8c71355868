"""Makes the entries of ``{folder: DIR}``: a dataset for each file stem or subfolder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.data.mixture.locate import dataset_name
from merit_fast.data.paths import COMPRESSIONS, container_of
from merit_fast.data.sources import Source, splits_of
from merit_fast.data.sources.folder import is_row_file
from merit_fast.data.sources.split_names import canonical
from merit_fast.errors import InputError

_HELD_OUT = ("test", "validation")  # the first that is there reports
_SPLITS = ("train", *_HELD_OUT)
_SHARD = re.compile(r"[-_.]\d{5}-of-\d{5}$")
_LAST_WORD = re.compile(r"[-._ ]+([^-._ ]+)$")
_FIRST_WORD = re.compile(r"^([^-._ ]+)[-._ ]+")


@dataclass(frozen=True)
class _Piece:
    """A file or a subfolder: rows of one split of one dataset."""

    name: str
    split: str
    path: Path


def folder_entries(folder: Path, where: str) -> list[dict[str, Any]]:
    """The entries of the datasets in a folder, by name, with absolute paths.

    ``a.jsonl`` and ``a.test.jsonl`` are the parts of a; so are ``train/a.jsonl`` and
    ``test/a.jsonl``. A subfolder is a dataset with the splits that its files' names carry.

    Args:
        folder: a local folder.
        where: file and key, for error messages.

    Raises:
        InputError: no folder, no rows in it, two places for one part, or held-out rows without
            training rows.
    """
    if not folder.is_dir():
        raise InputError(f"{where}: must be a folder, got {folder}")
    parts: dict[str, dict[str, Path]] = {}
    for piece in _pieces(folder.absolute()):
        splits = parts.setdefault(piece.name, {})
        if piece.split in splits:
            raise InputError(
                f"{where}: must hold one file or subfolder for the {piece.split} rows of "
                f"{piece.name}, got {splits[piece.split]} and {piece.path}"
            )
        splits[piece.split] = piece.path
    if not parts:
        raise InputError(f"{where}: must hold files of rows, found none in {folder}")
    return [_entry(name, splits, where) for name, splits in sorted(parts.items())]


def _entry(name: str, splits: dict[str, Path], where: str) -> dict[str, Any]:
    if "train" not in splits:
        (path, *_) = splits.values()
        rule = "has the name of held-out rows, and there are no training rows of that name"
        raise InputError(f"{where}: {path}: {rule}; list it under except to leave it out")
    path = splits["train"]
    entry: dict[str, Any] = {"name": name, "path": str(path)}
    held_out = next((splits[split] for split in _HELD_OUT if split in splits), None)
    if held_out:
        entry["eval_path"] = str(held_out)
    elif path.is_dir():
        inside = splits_of(Source(str(path))) or {}
        split = next((split for split in _HELD_OUT if split in inside), None)
        if split:
            entry["eval_split"] = split
    return entry


def _pieces(folder: Path) -> Iterator[_Piece]:
    for path in sorted(folder.iterdir()):
        if path.name[0] in "._":
            continue
        split = canonical(path.name)
        if path.is_dir() and split in _SPLITS:
            for piece in _pieces(path):
                yield _Piece(piece.name, split, piece.path)
        elif path.is_dir():
            if any(container_of(file.name) for file in path.rglob("*")):
                yield _Piece(dataset_name(path.name), "train", path)
        elif is_row_file(path.name):
            yield _piece_of_file(path)


def dataset_of_file(path: Path) -> str:
    """The name of the dataset whose rows a file holds: the file's name without its split."""
    return _piece_of_file(path).name


def _piece_of_file(path: Path) -> _Piece:
    """The dataset and the split that a file's name carries at its beginning or end."""
    stem = path.name
    for suffix in (*COMPRESSIONS, container_of(path.name)):
        stem = stem.removesuffix(suffix)
    stem = _SHARD.sub("", stem)
    for word in (_LAST_WORD, _FIRST_WORD):
        match = word.search(stem)
        if match and canonical(match[1]) in _SPLITS:
            return _Piece(dataset_name(word.sub("", stem)), canonical(match[1]), path)
    return _Piece(dataset_name(stem), "train", path)
