"""Takes over the stored rows of datasets that have not changed."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.manifests.atomic import link_file
from merit_fast.manifests.hashes import checksum
from merit_fast.row_store.writer import FORMAT_VERSION, INDEX_FILE, ROWS_FOLDER

_TAKEN = "rows.taken"  # the folder that replaces ROWS_FOLDER


def reuse_rows(
    directory: Path, earlier: Sequence[Path], fingerprints: Mapping[str, str]
) -> frozenset[str]:
    """Gives all stored rows that are known by their fingerprint the name of their dataset.

    Removes all other stored rows from ``directory``.

    Args:
        directory: the sketch stage's output under its temporary name.
        earlier: earlier outputs; absent folders count as empty.
        fingerprints: dataset -> fingerprint that its rows must have.

    Returns:
        Datasets whose rows are complete and undamaged in ``directory``.
    """
    wanted = set(fingerprints.values())
    known: dict[str, Path] = {}
    for folder in (*earlier, directory):
        known |= _intact(folder / ROWS_FOLDER, wanted)
    taken = directory / _TAKEN
    shutil.rmtree(taken, ignore_errors=True)
    found = {name for name, digest in fingerprints.items() if digest in known}
    for name in sorted(found):
        (taken / name).mkdir(parents=True)
        for file in known[fingerprints[name]].iterdir():
            link_file(file, taken / name / file.name)
    shutil.rmtree(directory / ROWS_FOLDER, ignore_errors=True)
    if found:
        os.rename(taken, directory / ROWS_FOLDER)
    return frozenset(found)


def has_rows(folders: Sequence[Path], fingerprint: str) -> bool:
    """Whether one of these outputs holds undamaged stored rows of this fingerprint."""
    return any(_intact(folder / ROWS_FOLDER, {fingerprint}) for folder in folders)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of one dataset's rows; None where they are incomplete or of another version."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        return dict(index) if index["version"] == FORMAT_VERSION else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _intact(rows: Path, wanted: set[str]) -> dict[str, Path]:
    """Fingerprint -> folder of the datasets whose every shard has the recorded hash."""
    folders = sorted(rows.iterdir()) if rows.is_dir() else []
    found = {}
    for folder in folders:
        index = read_index(folder)
        if index is None or index["fingerprint"] not in wanted:
            continue
        shards = index["shards"].items()
        if all(_is_intact(folder / name, digest) for name, (_, digest) in shards):
            found[str(index["fingerprint"])] = folder
    return found


def _is_intact(file: Path, digest: str) -> bool:
    return file.is_file() and checksum(file) == digest
