"""Makes the entries of ``{folder: DIR}``: a dataset for each file stem or subfolder."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.data.mixture.locate import dataset_name
from merit_fast.data.paths import COMPRESSIONS, container_of
from merit_fast.data.sources import Source, splits_of
from merit_fast.data.sources.folder import is_row_file, not_rows, shorten
from merit_fast.data.sources.places import LocalFolder
from merit_fast.data.sources.split_names import canonical
from merit_fast.data.sources.store import is_hidden
from merit_fast.errors import InputError

Entry = dict[str, Any]

_HELD_OUT = ("test", "validation")  # the first that is there reports
_SPLITS = ("train", *_HELD_OUT)
_SAVED = ("state.json", "dataset_dict.json")  # of a folder that is one dataset
_SHARD = re.compile(r"[-_.]\d{5}-of-\d{5}$")
_LAST_WORD = re.compile(r"[-._ ]+([^-._ ]+)$")
_FIRST_WORD = re.compile(r"^([^-._ ]+)[-._ ]+")


@dataclass(frozen=True)
class _Piece:
    """A file or a subfolder: rows of one split of one dataset."""

    stem: str
    split: str
    path: Path


def folder_entries(folder: Path, where: str) -> list[Entry]:
    """The entries of the datasets in a folder, by name, with absolute paths.

    ``a.jsonl`` and ``a.test.jsonl`` are the parts of a; so are ``train/a.jsonl`` and
    ``test/a.jsonl``. A subfolder is a dataset with the splits that its files' names carry. Files
    whose whole name is a split are the parts of a dataset of the folder's name.

    Args:
        folder: a local folder.
        where: file and key, for error messages.

    Returns:
        Entries; one without training rows has no ``path``, see ``check_training``.

    Raises:
        InputError: no folder, no rows in it, or two places for one part.
    """
    if not folder.is_dir():
        raise InputError(f"{where}: must be a folder, got {folder}")
    parts: dict[str, dict[str, Path]] = {}
    for piece in _pieces(folder.absolute(), folder.absolute().name):
        splits = parts.setdefault(piece.stem, {})
        if piece.split in splits:
            raise InputError(
                f"{where}: must hold one file or subfolder for the {piece.split} rows of "
                f"{piece.stem}, got {splits[piece.split]} and {piece.path}"
            )
        splits[piece.split] = piece.path
    if not parts:
        unread = not_rows(LocalFolder(str(folder)).names())
        hint = f"; not read: {shorten(unread)}" if unread else ""
        raise InputError(f"{where}: must hold files of rows, found none in {folder}{hint}")
    names = _names(parts)
    entries = [{"name": names[stem], **_places(splits)} for stem, splits in parts.items()]
    return sorted(entries, key=lambda entry: str(entry["name"]))


def check_training(entries: Sequence[Entry], where: str) -> None:
    """Checks that the chosen datasets of a folder have training rows.

    Raises:
        InputError: one has held-out rows only.
    """
    for entry in entries:
        if "path" not in entry:
            rule = "has the name of held-out rows, and there are no training rows of that name"
            raise InputError(
                f"{where}: {entry['eval_path']}: {rule}; except: {entry['name']} leaves it out"
            )


def files_of_no_dataset(folder: Path) -> str:
    """A note on the files of a folder that are no rows of its datasets; "" if there are none."""
    whole = LocalFolder(str(folder.absolute()))
    pieces = {piece.path for piece in _pieces(Path(whole.name), "")}
    unread = [
        name
        for name in not_rows(whole.names())
        if pieces.isdisjoint([Path(whole.name, name), *Path(whole.name, name).parents])
    ]
    return f"files of {folder.absolute().name} not read: {shorten(unread)}" if unread else ""


def _names(stems: Iterable[str]) -> dict[str, str]:
    """Stem -> name. A stem that is a name keeps it; others may get a number."""
    names: dict[str, str] = {}
    for stem in sorted(stems, key=lambda stem: (dataset_name(stem) != stem, stem)):
        names[stem] = dataset_name(stem, names.values())
    return names


def _places(splits: dict[str, Path]) -> Entry:
    """The keys of an entry that name its files."""
    held_out = next((splits[split] for split in _HELD_OUT if split in splits), None)
    path = splits.get("train")
    if path is None:
        return {"eval_path": str(held_out)}
    if held_out:
        return {"path": str(path), "eval_path": str(held_out)}
    inside = (splits_of(Source(str(path))) or {}) if path.is_dir() else {}
    split = next((split for split in _HELD_OUT if split in inside), None)
    return {"path": str(path), "eval_split": split} if split else {"path": str(path)}


def _pieces(folder: Path, own_stem: str) -> Iterator[_Piece]:
    """The pieces of a folder; ``own_stem`` is the dataset whose files are named by split only."""
    if any((folder / name).is_file() for name in _SAVED):
        yield _Piece(own_stem, "train", folder)
        return
    for path in sorted(folder.iterdir()):
        if is_hidden(f"{path.name}/" if path.is_dir() else path.name):
            continue
        split = canonical(path.name)
        if path.is_dir() and split in _SPLITS:
            for piece in _pieces(path, own_stem):
                yield _Piece(piece.stem, split, piece.path)
        elif path.is_dir():
            if any(is_row_file(name) for name in LocalFolder(str(path)).names()):
                yield _Piece(path.name, "train", path)
        elif is_row_file(path.name):
            yield _piece_of_file(path, own_stem)


def dataset_of_file(path: Path) -> str:
    """The name of the dataset whose rows a file holds: the file's name without its split."""
    return _piece_of_file(path, path.parent.name).stem


def _piece_of_file(path: Path, own_stem: str) -> _Piece:
    """The dataset and the split that a file's name carries, as a whole or at one of its ends."""
    stem = path.name
    for suffix in (*COMPRESSIONS, container_of(path.name)):
        stem = stem.removesuffix(suffix)
    stem = _SHARD.sub("", stem)
    if canonical(stem) in _SPLITS:
        return _Piece(own_stem, canonical(stem), path)
    for word in (_LAST_WORD, _FIRST_WORD):
        match = word.search(stem)
        if match and canonical(match[1]) in _SPLITS:
            return _Piece(word.sub("", stem), canonical(match[1]), path)
    return _Piece(stem, "train", path)
