"""Finds finished outputs by content and renames them, so that a new name costs no new work."""

import itertools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import fsync_path
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest

_UNFINISHED = (".tmp", ".old")  # ends of the names of outputs that are being written or replaced


def finished_outputs(folder: Path, stage: str) -> dict[str, Path]:
    """Fingerprint -> directory of every finished output of ``stage`` in ``folder``.

    Directories that hold something else are left out.
    """
    finished = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith(_UNFINISHED) or not (path / STAGE_FILE).is_file():
            continue
        try:
            manifest = read_manifest(StageManifest, path / STAGE_FILE)
        except InputError:  # of another version, or damaged: no output that could be used
            continue
        if manifest.stage == stage:
            finished[manifest.fingerprint] = path
    return finished


def move_outputs(moves: Mapping[Path, Path], aside: Path) -> None:
    """Renames every key to its value; two outputs may change places.

    A directory in the way that is not renamed itself goes to ``aside``. A crash leaves every output
    under some name in its folder, where ``finished_outputs`` finds it.
    """
    waiting = {}
    for source, target in moves.items():
        between = _free_name(source)
        os.rename(source, between)
        waiting[between] = target
    for between, target in waiting.items():
        if target.exists():
            _set_aside(target, aside)
        os.rename(between, target)
    for folder in {path.parent for path in (*moves, *moves.values())}:
        fsync_path(folder)


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.move{number}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def _set_aside(path: Path, aside: Path) -> None:
    manifest = path / STAGE_FILE
    digest = ""
    if manifest.is_file():
        digest = f"-{read_manifest(StageManifest, manifest).fingerprint[:12]}"
    kept = aside / f"{path.name}{digest}"
    aside.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(kept, ignore_errors=True)
    os.rename(path, kept)
