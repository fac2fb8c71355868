"""Expands ``mixture:`` into entries: from files of other stacks, folders and other mixtures."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.data.mixture.axolotl import axolotl_entries
from merit_fast.data.mixture.folder import (
    check_training,
    files_of_no_dataset,
    folder_entries,
)
from merit_fast.data.mixture.llamafactory import info_entries, run_entries
from merit_fast.data.mixture.locate import absolute, absolute_path, locate
from merit_fast.errors import InputError, show
from merit_fast.options.yaml import read_yaml

Entry = dict[str, Any]
_HELD_OUT_KEYS = ("eval_path", "eval_split", "eval_share")


def expand_mixture(mixture: Any, folder: Path, where: str) -> Any:
    """The list of entries that a value of ``mixture:`` stands for.

    An item is an entry, ``{from: FILE}`` or ``{folder: DIR}``; either may pick datasets by ``only``
    and ``except`` (globs) and give them further keys, which an own key of the dataset wins over.
    What is no such item stays as it is: ``parse`` names the rule that it breaks.

    Args:
        mixture: the value: a list of items, or one item.
        folder: the folder from which relative paths count.
        where: the file, for error messages.

    Raises:
        InputError: a file or folder is missing or of an unknown kind, a key in it cannot be
            honoured, or a name in ``only`` or ``except`` is of no dataset.
    """
    return _expand(mixture, folder, f"{where}: mixture", ())


def _expand(mixture: Any, folder: Path, where: str, seen: tuple[Path, ...]) -> Any:
    if isinstance(mixture, Mapping):
        return _expand_item(dict(mixture), folder, where, seen)
    if not isinstance(mixture, Sequence) or isinstance(mixture, str):
        return mixture
    entries: list[Any] = []
    for i, item in enumerate(mixture):
        if isinstance(item, Mapping):
            entries += _expand_item(dict(item), folder, f"{where}[{i}]", seen)
        else:
            entries.append(item)
    return entries


def _expand_item(item: Entry, folder: Path, where: str, seen: tuple[Path, ...]) -> list[Entry]:
    kinds = [key for key in ("from", "folder") if key in item]
    if not kinds:
        return [item]
    if len(kinds) == 2 or "path" in item or "name" in item:
        keys = ", ".join(key for key in ("from", "folder", "path", "name") if key in item)
        raise InputError(f"{where}: must have one of from, folder, or name and path, got {keys}")
    (kind,) = kinds
    place = item.pop(kind)
    if not isinstance(place, str) or not place:
        raise InputError(f"{where}.{kind}: must be a path, got {show(place)}")
    path = Path(locate(place, folder, f"{where}.{kind}", may_be_id=False))
    only = _patterns(item, "only", where)
    excluded = _patterns(item, "except", where)
    if isinstance(item.get("media"), str):
        item["media"] = absolute_path(item["media"], folder, f"{where}.media")
    if kind == "from":
        entries = _picked(_imported(path, f"{where}.from", seen), only, excluded, where)
    else:
        entries = _picked(folder_entries(path, f"{where}.folder"), only, excluded, where)
        check_training(entries, f"{where}.folder")
        if note := files_of_no_dataset(path):
            entries[0]["note"] = note
    return [_with_defaults(entry, item) for entry in entries]


def _imported(path: Path, where: str, seen: tuple[Path, ...]) -> list[Entry]:
    """The entries of a file, told by its keys."""
    if path.resolve() in seen:
        raise InputError(f"{where}: must not lead back to itself, got {path}")
    content = _read(path)
    folder = path.parent
    if isinstance(content, list) or (isinstance(content, dict) and "mixture" in content):
        mixture = content if isinstance(content, list) else content["mixture"]
        entries = _expand(mixture, folder, f"{path}: mixture", (*seen, path.resolve()))
        return [_located(entry, folder, f"{path}: mixture[{i}]") for i, entry in enumerate(entries)]
    if isinstance(content, dict) and ("datasets" in content or "test_datasets" in content):
        return axolotl_entries(content, path)
    if isinstance(content, dict) and isinstance(content.get("dataset"), str | list):
        return run_entries(content, path, _read)
    if isinstance(content, dict) and all(isinstance(value, dict) for value in content.values()):
        return info_entries(content, path)
    raise InputError(
        f"{where}: must be a YAML with mixture, a YAML of axolotl with datasets, a YAML of "
        f"LLaMA-Factory with dataset, or its dataset_info.json, got {path}"
    )


def _located(entry: Any, folder: Path, where: str) -> Entry:
    """The entry of another mixture with absolute paths."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: must be a mapping of keys, got {show(entry)}")
    for key in ("path", "eval_path"):
        if isinstance(entry.get(key), str):
            entry[key] = absolute(entry[key], folder, f"{where}.{key}")
    if isinstance(entry.get("media"), str):
        entry["media"] = absolute_path(entry["media"], folder, f"{where}.media")
    return entry


def _read(path: Path) -> Any:
    if path.suffix != ".json":
        return read_yaml(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as JSON: {reason}") from None


def _patterns(item: Entry, key: str, where: str) -> list[str] | None:
    value = item.pop(key, None)
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(text, str) for text in patterns):
        raise InputError(f"{where}.{key}: must be a list of names or globs, got {show(value)}")
    return patterns


def _picked(
    entries: list[Entry], only: list[str] | None, excluded: list[str] | None, where: str
) -> list[Entry]:
    """The entries that ``only`` names, without those that ``except`` names.

    Raises:
        InputError: a pattern names none, or none is left.
    """
    names = [str(entry.get("name", "")) for entry in entries]
    for key, patterns in (("only", only), ("except", excluded)):
        for pattern in patterns or ():
            if not fnmatch.filter(names, pattern):
                known = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
                raise InputError(
                    f"{where}.{key}: must name datasets among {known}, got {pattern!r}"
                )
    picked = [
        entry
        for entry, name in zip(entries, names, strict=True)
        if (only is None or _matches(name, only)) and not _matches(name, excluded or ())
    ]
    if not picked:
        raise InputError(f"{where}: must leave at least one dataset, got none of {len(entries)}")
    return picked


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _with_defaults(entry: Entry, defaults: Entry) -> Entry:
    """The entry with the keys that it lacks; what is held out is settled by one of both."""
    is_settled = any(entry.get(key) is not None for key in _HELD_OUT_KEYS)
    own = {key: value for key, value in entry.items() if value is not None}
    given = {
        key: value for key, value in defaults.items() if not (is_settled and key in _HELD_OUT_KEYS)
    }
    return {**given, **own}
