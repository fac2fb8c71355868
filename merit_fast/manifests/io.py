"""How the JSON files in which stages meet (``schemas``) are read and written, and how outputs come to be complete.

Every file is written beside its final name, fsynced and renamed. Every output directory is filled as ``NAME.tmp`` and
renamed when whole, so what bears the final name is finished; a killed stage leaves only ``NAME.tmp``, which the same
command picks up again. A manifest carries the fingerprint of all that went into it: equal fingerprint, nothing to do.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.schemas import SCHEMA_VERSION
from merit_fast.options.fields import parse, to_plain

STAGE_FILE = "stage.json"
_MARKER = "fingerprint"  # in an unfinished output: which stage may go on with it

T = TypeVar("T")


@dataclass(frozen=True)
class StageManifest:
    """stage.json, written last into a stage's output: what made it. Replays with ``config``."""

    stage: str
    fingerprint: str  # of stage, schema version, config and inputs
    config: dict[str, Any]
    inputs: dict[str, str]  # name -> fingerprint
    tool_versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION


def fingerprint(data: Any) -> str:
    """32 hex digits that depend on JSON-ready ``data`` alone (keys sorted)."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Readable(Protocol):
    """A file here or in an object store."""

    def read_text(self, encoding: str = ...) -> str: ...


def read_manifest(cls: type[T], path: Readable) -> T:
    """Reads and validates one manifest.

    Raises:
        InputError: missing, not JSON, of another schema version, or with unknown, missing or ill-typed keys.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: is not readable JSON ({error})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version: must be {SCHEMA_VERSION}, got {version!r}")
    return parse(cls, data, where=str(path))


def write_manifest(manifest: Any, path: Path) -> None:
    """Writes a manifest dataclass as JSON: the same object gives the same bytes."""
    write_text(path, manifest_text(manifest))


def manifest_text(manifest: Any) -> str:
    """What ``write_manifest`` writes."""
    return json.dumps(to_plain(manifest), indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old content or the new, never a part."""
    temporary = path.with_name(
        f"{path.name}.{os.getpid()}.tmp"
    )  # other processes may write the same file
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_path(path.parent)


@contextlib.contextmanager
def output_directory(path: Path, manifest: StageManifest, fsync: bool = True) -> Iterator[Path]:
    """Yields ``path.tmp`` to fill; on success adds stage.json, fsyncs and renames it to ``path``.

    What an interrupted run of the same fingerprint left in ``path.tmp`` is kept for the stage to resume from; what
    another run left there is removed. An exception leaves ``path.tmp`` for the next try and ``path`` untouched.
    """
    temporary = begin_directory(path, manifest.fingerprint)
    yield temporary
    finish_directory(temporary, path, manifest, fsync)


def begin_directory(path: Path, fingerprint: str) -> Path:
    """``path.tmp``, emptied unless a run of the same fingerprint left it. Several processes may call this at once."""
    temporary = path.with_name(path.name + ".tmp")
    marker = temporary / _MARKER
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_name(path.name + ".begin.lock")):
            if temporary.exists() and (not marker.exists() or marker.read_text() != fingerprint):
                shutil.rmtree(temporary)
            temporary.mkdir(exist_ok=True)
            if not marker.exists():
                write_text(marker, fingerprint)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return temporary


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time, by a lock file that is gone afterwards."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # whoever held it has removed it
    try:
        yield
    finally:
        lock.unlink()
        os.close(descriptor)


def finish_directory(
    temporary: Path, path: Path, manifest: StageManifest, fsync: bool = True
) -> None:
    """Adds stage.json and renames the directory to ``path``."""
    for leftover in temporary.glob("*.tmp"):  # of a writer that was killed
        leftover.unlink()
    write_manifest(manifest, temporary / STAGE_FILE)
    (temporary / _MARKER).unlink()
    commit_directory(temporary, path, fsync)


def commit_directory(temporary: Path, path: Path, fsync: bool = True) -> None:
    """Fsyncs every file of ``temporary`` and renames it to ``path``, replacing what was there."""
    mask = os.umask(0)
    os.umask(mask)
    for file in sorted(temporary.rglob("*")):
        if file.is_file():
            file.chmod(0o666 & ~mask)  # safetensors' writer makes 0600 whatever the umask
        if fsync:
            _fsync_path(file)
    if fsync:
        _fsync_path(temporary)
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(temporary, path)
    if fsync:
        _fsync_path(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(path: Path, expected_fingerprint: str) -> None:
    """Gives a finished output its name if a crash came in between: stage.json is written last, so it tells."""
    temporary = path.with_name(path.name + ".tmp")
    if is_complete(temporary, expected_fingerprint):
        (temporary / _MARKER).unlink(missing_ok=True)
        commit_directory(temporary, path)


def is_complete(path: Path, expected_fingerprint: str) -> bool:
    """Whether ``path`` holds the finished output of exactly this stage, config and inputs."""
    file = path / STAGE_FILE
    return file.exists() and read_manifest(StageManifest, file).fingerprint == expected_fingerprint


def stage_manifest(stage: str, config: Any, inputs: dict[str, str]) -> StageManifest:
    """The manifest of a stage about to run; its fingerprint covers stage, schema, config and inputs."""
    plain = to_plain(config)
    mark = fingerprint([stage, SCHEMA_VERSION, plain, inputs])
    return StageManifest(stage, mark, plain, inputs, tool_versions())


def tool_versions() -> dict[str, str]:
    """Versions of what can change a result, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("merit_fast", "torch", "transformers", "safetensors", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return versions


def require_stage(path: Path, stage: str, command: str) -> StageManifest:
    """The stage.json of an earlier stage's output.

    Raises:
        MeritFastError: that stage has not finished; the message names the command that runs it.
    """
    if not (path / STAGE_FILE).exists():
        raise MeritFastError(f"{path}: {stage} has not been run; run: {command}")
    return read_manifest(StageManifest, path / STAGE_FILE)


def _fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
