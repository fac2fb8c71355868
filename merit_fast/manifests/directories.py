"""Output directories: filled under a temporary name, renamed when complete.

An output directory is filled as ``NAME.tmp``, gets stage.json last and is then renamed to ``NAME``.
So every ``NAME`` is complete, and a killed stage leaves only ``NAME.tmp``, which the same command
resumes.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from merit_fast.errors import InputError, write_error
from merit_fast.manifests.atomic import fsync_path, link_file, write_text
from merit_fast.manifests.hashes import compare_files, record_files
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest, write_manifest
from merit_fast.manifests.kept import RECORD_SUFFIX, put_record, read_records, remove_records
from merit_fast.manifests.ledger import adopt
from merit_fast.manifests.locks import check_owners, claim, exclusive, locks_of, this_process
from merit_fast.records import replace
from merit_fast.threads import map_in_threads

_THREADS = 8  # one commit of the file system's journal serves all that wait for it
_WEIGHTS = ".safetensors"
_MARKER = "fingerprint"  # file in NAME.tmp: only a run of this fingerprint resumes it


@contextlib.contextmanager
def output_directory(
    path: Path,
    manifest: StageManifest,
    fsync: bool = True,
    *,
    keep_old: Path | None = None,
    keep_work: bool = False,
) -> Iterator[Path]:
    """Yields ``path.tmp`` to fill; on success adds stage.json, fsyncs and renames it to ``path``.

    Keeps the files that an interrupted run of the same fingerprint left in ``path.tmp``, and
    removes those of any other run. An exception leaves ``path.tmp`` for the next run and ``path``
    untouched. This process owns both from the first byte to the rename.

    Args:
        path: the output.
        manifest: stage.json of the output, without its files.
        fsync: whether all files reach the disk before the rename.
        keep_old: place to which the replaced output moves; None: it is removed.
        keep_work: keep the files that a run of another fingerprint left; the stage checks them.

    Raises:
        LockedError: another process owns the output.
        InputError: see ``begin_directory``.
    """
    with own_directory(path, manifest.fingerprint):
        temporary = begin_directory(path, manifest.fingerprint, keep_work)
        yield temporary
        finish_directory(temporary, path, manifest, fsync, keep_old)


@contextlib.contextmanager
def copied_directory(
    path: Path, stage_text: str, fingerprint: str, keep_old: Path | None = None
) -> Iterator[Path]:
    """Yields ``path.tmp`` to fill with a copy of a finished output, then renames it to ``path``.

    Files that the copy's stage.json does not name are removed from ``path.tmp``: a stage that was
    killed here may have left some.

    Args:
        path: the output.
        stage_text: stage.json of the output, which the copy gets word for word.
        fingerprint: the output's.
        keep_old: as in ``output_directory``.

    Raises:
        LockedError: another process owns the output.
        InputError: see ``begin_directory``.
    """
    with own_directory(path, fingerprint):
        temporary = begin_directory(path, fingerprint)
        yield temporary
        write_text(temporary / STAGE_FILE, stage_text)
        named = {STAGE_FILE, *read_manifest(StageManifest, temporary / STAGE_FILE).files}
        for file in list(temporary.rglob("*")):
            if file.is_file() and file.relative_to(temporary).as_posix() not in named:
                file.unlink()
        commit_directory(temporary, path, keep_old=keep_old)


def own_directory(path: Path, fingerprint: str) -> contextlib.AbstractContextManager[None]:
    """Makes this process the only one that may write or rename ``path`` and ``path.tmp``.

    The kernel ends the ownership when the process dies.
    """
    return claim(locks_of(path), this_process(fingerprint, alone=True), path)


def begin_directory(
    path: Path, fingerprint: str, keep_work: bool = False, fsync: bool = True
) -> Path:
    """Makes ``path.tmp`` and returns it; several processes may call this at once.

    Empties the directory unless a run of the same fingerprint left it, or ``keep_work``.

    Raises:
        LockedError: a live process has claimed it for another fingerprint.
        InputError: the directory cannot be written, or is none of ours.
    """
    temporary = path.with_name(path.name + ".tmp")
    marker = temporary / _MARKER
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(locks_of(path) / "begin"):
            check_owners(path, fingerprint)
            _require_own(temporary)
            same = marker.exists() and marker.read_text() == fingerprint
            if temporary.exists() and not same and not keep_work:
                _remove(temporary)
            temporary.mkdir(exist_ok=True)
            if not same:
                write_text(marker, fingerprint, fsync)
                (temporary / STAGE_FILE).unlink(missing_ok=True)  # of the other fingerprint
    except OSError as error:
        raise write_error(path, error) from None
    return temporary


def is_own_work(temporary: Path) -> bool:
    """Whether merit-fast made this ``NAME.tmp``: it has our marker, or a stage.json, or nothing."""
    if not temporary.is_dir():
        return False
    names = [name for name in os.listdir(temporary) if not name.startswith(f"{_MARKER}.")]
    return not names or _MARKER in names or STAGE_FILE in names


def _require_own(temporary: Path) -> None:
    if temporary.exists() and not is_own_work(temporary):
        raise InputError(f"{temporary}: is not unfinished work of merit-fast; move it away")


def finish_directory(
    temporary: Path,
    path: Path,
    manifest: StageManifest,
    fsync: bool = True,
    keep_old: Path | None = None,
) -> None:
    """Adds stage.json with the hashes of all files and renames the directory to ``path``.

    The files are hashed while they are still in the page cache, right before the fsync; those with
    a record of this content next to them are not hashed again.
    """
    for name in os.listdir(temporary):  # from a writer that was killed
        if name.endswith((".tmp", ".part")):
            (temporary / name).unlink()
    records = record_files(temporary, read_records(temporary))
    files = {
        name: (size, digest)
        for name, (size, _, digest) in records.items()
        if name not in (_MARKER, STAGE_FILE) and not name.endswith(RECORD_SUFFIX)
    }
    write_manifest(replace(manifest, files=files), temporary / STAGE_FILE, fsync=False)
    _seal(temporary, fsync)
    remove_records(temporary)
    (temporary / _MARKER).unlink()  # after a power cut, stage.json or the marker names the owner
    if fsync:
        fsync_path(temporary)
    _publish(temporary, path, fsync, keep_old)


def commit_directory(
    temporary: Path, path: Path, fsync: bool = True, keep_old: Path | None = None
) -> None:
    """Fsyncs every file of ``temporary`` and renames it to ``path``, which it replaces.

    Args:
        temporary: the complete directory.
        path: its final name.
        fsync: whether all files reach the disk before the rename.
        keep_old: place to which the replaced directory moves; None: it is removed.
    """
    _seal(temporary, fsync)
    _publish(temporary, path, fsync, keep_old)


def _seal(folder: Path, fsync: bool) -> None:
    """Gives every file of a folder the usual mode; ``fsync``: all of it is on the disk then."""
    mask = os.umask(0)
    os.umask(mask)
    mode = 0o666 & ~mask
    inside = list(folder.rglob("*"))
    for file in inside:
        status = file.stat()
        if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) != mode:
            file.chmod(mode)  # safetensors' writer makes 0600 whatever the umask
    if fsync:
        map_in_threads(fsync_path, [*inside, folder], _THREADS)


def _publish(temporary: Path, path: Path, fsync: bool, keep_old: Path | None) -> None:
    """Renames a sealed folder to ``path``; see ``commit_directory``."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        _remove(keep_old or old, ignore_errors=True)
        (keep_old or old).parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, keep_old or old)
    os.rename(temporary, path)
    if fsync:
        fsync_path(path.parent)
    _remove(old, ignore_errors=True)


def _remove(folder: Path, ignore_errors: bool = False) -> None:
    """Removes a folder with all it holds, if it exists; most outputs replace none."""
    if folder.exists():
        import shutil

        shutil.rmtree(folder, ignore_errors=ignore_errors)


def recover_directory(path: Path, expected_fingerprint: str, keep_old: Path | None = None) -> None:
    """Renames ``path.tmp`` to ``path`` if a crash came between its stage.json and the rename.

    After a power cut its files may lack content: then all of it is removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    if not is_complete(temporary, expected_fingerprint):
        return
    with own_directory(path, expected_fingerprint):
        (temporary / _MARKER).unlink(missing_ok=True)
        remove_records(temporary)
        damage, _ = compare_files(temporary, adopt(temporary).files)
        if damage is None:
            commit_directory(temporary, path, keep_old=keep_old)
        else:
            _remove(temporary)


def is_complete(path: Path, expected_fingerprint: str) -> bool:
    """Whether the stage.json of ``path`` is that of exactly this stage, config and inputs."""
    try:
        manifest = read_manifest(StageManifest, path / STAGE_FILE)
    except InputError:  # absent, damaged or of another version
        return False
    return manifest.fingerprint == expected_fingerprint


def has_whole_files(path: Path, expected_fingerprint: str) -> bool:
    """Whether ``path`` is complete and its files have their sizes; no file is hashed."""
    try:
        manifest = read_manifest(StageManifest, path / STAGE_FILE)
        sizes = {name: (path / name).stat().st_size for name in manifest.files}
    except (InputError, OSError):  # absent, damaged or of another version
        return False
    recorded = {name: size for name, (size, _) in manifest.files.items()}
    return manifest.fingerprint == expected_fingerprint and sizes == recorded


def take_files(finished: Path, directory: Path) -> None:
    """Links the weight files of a finished output into an unfinished one, with their records.

    The writer of ``directory`` compares their bytes with the records.
    """
    files = read_manifest(StageManifest, finished / STAGE_FILE).files
    for name, (_, digest) in files.items():
        if name.endswith(_WEIGHTS):
            link_file(finished / name, directory / name)
            status = (directory / name).stat()
            put_record(directory / name, (status.st_size, status.st_mtime_ns, digest))
