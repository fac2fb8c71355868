"""Gives finished outputs other names and labels without writing their large files again."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.directories import begin_directory, is_own_work, own_directory
from merit_fast.manifests.hashes import checksum, list_files
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest, write_manifest
from merit_fast.records import replace


def copy_output(source: Path, target: Path, changed: Mapping[str, str]) -> None:
    """Fills ``target.tmp`` with the finished output ``source``.

    Files are hard links where the file system has them. ``recover_directory`` then gives the copy
    its name; until then a crash leaves ``source`` and ``target`` as they were.

    Args:
        source: a finished output.
        target: the name of the copy; ``source`` itself is allowed.
        changed: name -> text of the files that differ in the copy.

    Raises:
        LockedError: another process owns ``target``.
        InputError: ``target.tmp`` cannot be written, or is none of ours.
    """
    manifest = read_manifest(StageManifest, source / STAGE_FILE)
    with own_directory(target, manifest.fingerprint):
        _fill(source, target, changed, manifest)


def _fill(source: Path, target: Path, changed: Mapping[str, str], manifest: StageManifest) -> None:
    temporary = target.with_name(target.name + ".tmp")
    if is_own_work(temporary):
        shutil.rmtree(temporary)  # of a training or a copy that was killed
    begin_directory(target, manifest.fingerprint)
    files = dict(manifest.files)
    for name in list_files(source):
        if name != STAGE_FILE and name not in changed:
            _link(source / name, temporary / name)
    for name, text in changed.items():
        write_text(temporary / name, text)
        files[name] = ((temporary / name).stat().st_size, checksum(temporary / name))
    write_manifest(replace(manifest, files=files), temporary / STAGE_FILE)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
