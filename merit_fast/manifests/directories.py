"""Output directories: filled under a temporary name, renamed when complete.

An output directory is filled as ``NAME.tmp``, gets stage.json last and is then renamed to ``NAME``.
So every ``NAME`` is complete, and a killed stage leaves only ``NAME.tmp``, which the same command
resumes.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.atomic import fsync_path, write_text
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest, write_manifest

_MARKER = "fingerprint"  # file in NAME.tmp: only a run of this fingerprint resumes it


@contextlib.contextmanager
def output_directory(path: Path, manifest: StageManifest, fsync: bool = True) -> Iterator[Path]:
    """Yields ``path.tmp`` to fill; on success adds stage.json, fsyncs and renames it to ``path``.

    Keeps the files that an interrupted run of the same fingerprint left in ``path.tmp``, and
    removes those of any other run. An exception leaves ``path.tmp`` for the next run and ``path``
    untouched.
    """
    temporary = begin_directory(path, manifest.fingerprint)
    yield temporary
    finish_directory(temporary, path, manifest, fsync)


def begin_directory(path: Path, fingerprint: str) -> Path:
    """Makes ``path.tmp`` and returns it; several processes may call this at once.

    Empties the directory unless a run of the same fingerprint left it.

    Raises:
        InputError: the directory cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    marker = temporary / _MARKER
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".begin.lock")):
            if temporary.exists() and (not marker.exists() or marker.read_text() != fingerprint):
                shutil.rmtree(temporary)
            temporary.mkdir(exist_ok=True)
            if not marker.exists():
                write_text(marker, fingerprint)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return temporary


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Lets one process at a time through, by a lock file that is removed afterwards."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # the previous holder has removed this file: try the next one
    try:
        yield
    finally:
        lock.unlink()
        os.close(descriptor)


def finish_directory(
    temporary: Path, path: Path, manifest: StageManifest, fsync: bool = True
) -> None:
    """Adds stage.json and renames the directory to ``path``."""
    for leftover in temporary.glob("*.tmp"):  # from a writer that was killed
        leftover.unlink()
    write_manifest(manifest, temporary / STAGE_FILE)
    (temporary / _MARKER).unlink()
    commit_directory(temporary, path, fsync)


def commit_directory(temporary: Path, path: Path, fsync: bool = True) -> None:
    """Fsyncs every file of ``temporary`` and renames it to ``path``, which it replaces."""
    mask = os.umask(0)
    os.umask(mask)
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~mask)  # safetensors' writer makes 0600 whatever the umask
        if fsync:
            fsync_path(file)
    if fsync:
        fsync_path(temporary)
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(temporary, path)
    if fsync:
        fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(path: Path, expected_fingerprint: str) -> None:
    """Renames ``path.tmp`` to ``path`` if a crash came between its stage.json and the rename."""
    temporary = path.with_name(path.name + ".tmp")
    if is_complete(temporary, expected_fingerprint):
        (temporary / _MARKER).unlink(missing_ok=True)
        commit_directory(temporary, path)


def is_complete(path: Path, expected_fingerprint: str) -> bool:
    """Whether ``path`` holds the finished output of exactly this stage, config and inputs."""
    file = path / STAGE_FILE
    return file.exists() and read_manifest(StageManifest, file).fingerprint == expected_fingerprint
