"""Finds the files of rows below some places, names datasets and pairs training with held-out rows.

Only names are read here: ``capitals.eval.jsonl``, ``test/capitals.jsonl`` and
``capitals/test.parquet`` are held-out rows of ``capitals``.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from merit_fast.data.paths import COMPRESSIONS, ROW_SUFFIXES, container_of
from merit_fast.errors import InputError
from merit_fast.manifests.stages import STAGES

_TRAIN = ("train", "training")
# The first that is there is taken: rows that report come before rows that tune.
_HELD_OUT = ("eval", "evaluation", "test", "heldout", "validation", "val", "valid", "dev")
_UNREAD = (".zip", ".tar", ".xlsx", ".pkl")
_SHARD = re.compile(r"[-_.]\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class Candidate:
    """Rows that may become a dataset; ``path`` and ``eval_path`` are files or directories."""

    name: str
    path: Path
    eval_path: Path | None = None
    others: tuple[Path, ...] = ()  # further held-out files, which a run has no use for


@dataclass
class Scan:
    """Candidates in the order of their names, and the files that no run can use."""

    candidates: list[Candidate] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)  # "PATH: reason"


def scan(places: Sequence[Path]) -> Scan:
    """Looks through files and directories.

    Raises:
        InputError: a place does not exist.
    """
    for place in places:
        if not place.exists():
            raise InputError(f"{place}: does not exist")
    root = Path(os.path.commonpath([os.path.abspath(_folder(place)) for place in places]))
    result = Scan()
    parts: dict[tuple[str, ...], dict[str, list[Path]]] = {}
    for file in sorted(file for place in places for file in _files(place)):
        if file.suffix in _UNREAD:
            rule = "not read: unpack it, or convert it to JSONL or Parquet"
            result.unused.append(f"{file}: {rule}")
        else:
            key, role = _key_and_role(Path(os.path.abspath(file)).relative_to(root))
            parts.setdefault(key or (root.name,), {}).setdefault(role, []).append(file)
    lasts = Counter(_clean(key[-1]) for key in parts)
    for key, by_role in sorted(parts.items()):
        last = _clean(key[-1])
        name = last if lasts[last] == 1 else _clean("-".join(key))
        taken = [candidate.name for candidate in result.candidates]
        while name in taken:
            name += "-more"
        _add(result, name, by_role)
    return result


def _folder(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _files(place: Path) -> Iterator[Path]:
    """Files of rows at or below a place, without models, outputs of runs and hidden files."""
    if place.is_file():
        yield place
        return
    for folder, folders, names in os.walk(place):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not _is_left_out(here / name))
        for name in names:
            container = container_of(name)
            is_read = Path(name).suffix in _UNREAD or container not in ("", ".json")
            if name[0] != "." and (is_read or (container and _holds_rows(here / name))):
                yield here / name


def _is_left_out(folder: Path) -> bool:
    is_output = any((folder / stage.folder / "stage.json").exists() for stage in STAGES)
    return folder.name[0] == "." or is_output or (folder / "config.json").exists()


def _holds_rows(file: Path) -> bool:
    """Whether a .json file begins with an object on a line by itself, as JSONL, or with an array.

    A compressed one counts as rows. Reading it names the rule where an array holds no rows.
    """
    if file.suffix != ".json":
        return True
    with open(file, "rb") as lines:
        first = lines.readline(1 << 20).strip()
    return first.startswith(b"[") or (first.startswith(b"{") and first.endswith(b"}"))


def _key_and_role(path: Path) -> tuple[tuple[str, ...], str]:
    """Parts of the dataset's name, and the role of its rows, from a path relative to the root."""
    role = ""
    key = []
    for folder in path.parts[:-1]:
        if _role(folder):
            role = _role(folder)
        else:
            key.append(folder)
    stem = _SHARD.sub("", _stem(path))
    words = re.split(r"[._\-]+", re.sub(r"held[._-]?out", "heldout", stem, flags=re.IGNORECASE))
    for place in (-1, 0):
        if _role(words[place]):
            role = _role(words[place])
            stem = _without(stem, place)
            break
    return (*key, *([stem] if stem else [])), role or "train"


def _stem(path: Path) -> str:
    """The file's name without the suffixes of its container and its compression."""
    container = container_of(path.name)
    name = path.name
    for suffix in COMPRESSIONS if container else ():
        name = name.removesuffix(suffix)
    return name.removesuffix(container or path.suffix)


def _role(word: str) -> str:
    lower = re.sub(r"[._-]", "", word.lower())
    return "train" if lower in _TRAIN else lower if lower in _HELD_OUT else ""


def _without(stem: str, place: int) -> str:
    """The stem without its first or last word."""
    word = r"(held[._-]?out|[^._\-]+)"
    pattern = rf"^{word}[._\-]*" if place == 0 else rf"[._\-]*{word}$"
    return re.sub(pattern, "", stem, count=1, flags=re.IGNORECASE)


def _clean(text: str) -> str:
    """The text as a dataset's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "rows"


def _add(result: Scan, name: str, by_role: dict[str, list[Path]]) -> None:
    held_out: list[Path] = []
    for role in _HELD_OUT:
        if role in by_role:
            held_out += _one_place(result, by_role[role])
    if "train" not in by_role:
        rule = "has the name of held-out rows, and there are no training rows of that name"
        result.unused += [f"{path}: {rule}" for path in held_out]
        return
    for path in _one_place(result, by_role["train"]):
        first, *others = [*held_out, None]
        result.candidates.append(Candidate(name, path, first, tuple(filter(None, others))))


def _one_place(result: Scan, files: list[Path]) -> list[Path]:
    """The file, or the directory that holds these files and no other rows."""
    files = _without_copies(result, files)
    if len(files) == 1:
        return files
    folder = files[0].parent
    inside = {file for file in folder.iterdir() if container_of(file.name) and file.name[0] != "."}
    if inside == set(files):
        return [folder]
    rule = "one of several files of one name: put them into a folder of their own"
    result.unused += [f"{file}: {rule}" for file in files]
    return []


def _without_copies(result: Scan, files: list[Path]) -> list[Path]:
    """One file of each name: JSONL before Parquet, as a person can read it."""
    order = {suffix: place for place, suffix in enumerate(ROW_SUFFIXES)}
    kept: dict[Path, Path] = {}
    for file in sorted(files, key=lambda file: order.get(container_of(file.name), len(order))):
        first = kept.setdefault(file.with_name(_stem(file)), file)
        if first is not file:
            result.unused.append(f"{file}: not read: {first.name} has the same name")
    return sorted(kept.values())
