"""Finds the split that the names of files and folders carry, by the rules of ``datasets``."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from merit_fast.errors import InputError

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _KEYWORDS.items() for word in words}
_WORD_END = "-._ 0-9"
_WORDS = re.compile(
    rf"(?:^|(?<=[{_WORD_END}]))({'|'.join(_SPLIT_OF)})(?=[{_WORD_END}]|$)", re.IGNORECASE
)
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


def canonical(split: str) -> str:
    """The name that ``datasets`` gives to a split: validation for val, valid and dev."""
    return _SPLIT_OF.get(split.lower(), split)


def spellings(split: str) -> tuple[str, ...]:
    """The names by which an entry may ask for a split."""
    return (split, *(_KEYWORDS.get(split, ())))


def divide(names: Sequence[str], base: str) -> dict[str, list[str]]:
    """Divides files by the split in their names; a file that no rule takes is in no split.

    The first rule that takes any file decides: files ``data/SPLIT-00000-of-00001.*``, then names
    of folders, then names of files, then everything is train. Letters count without their case.

    Args:
        names: paths relative to the folder, with ``/``.
        base: the folder, for error messages.

    Raises:
        InputError: a name carries two splits.
    """
    rules = (
        _shard_splits,
        lambda name: _splits_in(PurePosixPath(name).parts[:-1]),
        lambda name: _splits_in(PurePosixPath(name).parts[-1:]),
        lambda name: {"train"},
    )
    for rule in rules:
        divided: dict[str, list[str]] = {}
        for name in names:
            splits = rule(name)
            if len(splits) > 1:
                found = " and ".join(sorted(splits))
                raise InputError(f"{base}: {name}: must carry one split in its name, got {found}")
            for split in splits:
                divided.setdefault(split, []).append(name)
        if divided:
            return divided
    return {}


def _shard_splits(name: str) -> set[str]:
    match = _SHARD.fullmatch(name)
    return {match[1]} if match else set()


def _splits_in(parts: Sequence[str]) -> set[str]:
    return {_SPLIT_OF[word.lower()] for part in parts for word in _WORDS.findall(part)}
