"""Fills the folder of an export; a crash leaves none that looks finished."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from merit_fast.errors import InputError, write_error
from merit_fast.manifests.atomic import fsync_path
from merit_fast.manifests.directories import own_directory

GROUPS = "groups.json"  # moves last
IMAGES = "images"
INFO = "dataset_info.json"
_UNFINISHED = ".unfinished"
_OWN = re.compile(
    r"(train|val)_\d+(\.\d+)?\.jsonl|(axolotl|llamafactory|trl)_\d+\.yml|dataset_info\.json"
)


def check_folder(folder: Path) -> None:
    """Checks that an export may go into the folder.

    Raises:
        InputError: it is no folder, or holds something else than an export.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder}: must be a folder, found a file")
    names = sorted(os.listdir(folder))
    if names and _UNFINISHED not in names and not _is_export(folder):
        rule = "must be empty or hold an earlier export"
        raise InputError(f"{folder}: {rule}, found {names[0]}")


@contextlib.contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to fill; its files then replace an earlier export in ``folder``.

    An exception leaves ``folder`` as it was. Other files in it stay, such as trained models.

    Raises:
        LockedError: another process exports into it.
        InputError: the folder cannot be written.
    """
    with own_directory(folder, "export"):
        yield from _filled(folder)


def _filled(folder: Path) -> Iterator[Path]:
    was_there = folder.exists()
    unfinished = folder / _UNFINISHED
    try:
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise write_error(folder, error) from None
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished)
        if not was_there:
            folder.rmdir()
        raise
    _replace(folder, unfinished)


def _replace(folder: Path, unfinished: Path) -> None:
    for file in unfinished.rglob("*"):
        fsync_path(file)
    (folder / GROUPS).unlink(missing_ok=True)
    for path in list(folder.iterdir()):
        if _OWN.fullmatch(path.name):
            path.unlink()
    if (folder / IMAGES).exists():
        shutil.rmtree(folder / IMAGES)
    for name in sorted(os.listdir(unfinished), key=lambda name: name == GROUPS):
        os.replace(unfinished / name, folder / name)
    unfinished.rmdir()
    fsync_path(folder)


def _is_export(folder: Path) -> bool:
    try:
        report = json.loads((folder / GROUPS).read_text(encoding="utf-8"))
        return {"format", "groups", "merge"} <= set(report)
    except (OSError, ValueError, TypeError):
        return False
