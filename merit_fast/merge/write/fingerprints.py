"""Fingerprints of a merge's inputs: of every file that the output depends on."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from merit_fast.manifests.hashes import SMALL_BYTES, checksum
from merit_fast.merge.read.remote import Location, RemotePath, version_of

_DESCRIBING = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".spm", ".metadata")


def input_fingerprints(paths: Sequence[Location], files: Collection[Location]) -> dict[str, str]:
    """32 hex digits per model, which change when a file may have changed that a merge reads.

    A file below 1 MiB counts by its content. A larger one counts by its size, the time of its last
    write and the time of its last change of any kind, which no program can set: a merge does not
    read its inputs twice. Not seen are writes that go around the file system. In a store, names,
    sizes and ETags count.

    Args:
        paths: models, as directories, files or URLs.
        files: files from which tensors are read; one outside of all paths counts by itself.

    Raises:
        InputError, MeritFastError: see ``RemotePath.entries``.
    """
    fingerprints = {}
    others = set(files)
    for path in dict.fromkeys(paths):
        inside = {file for file in others if file == path or path in file.parents}
        others -= inside
        fingerprints[str(path)] = _fingerprint(path, inside)
    for file in sorted(others, key=str):
        fingerprints[str(file)] = _fingerprint(file, {file})
    return fingerprints


def _fingerprint(path: Location, files: set[Location]) -> str:
    states = {}
    if isinstance(path, RemotePath):
        entries = path.entries(fresh=True)
        names = [name for name in entries if name.endswith((*_DESCRIBING, ".safetensors"))]
        states = {name: version_of(entries[name]) for name in names}
    else:
        folders = {path, *(Path(str(file)).parent for file in files)}
        describing = (file for folder in folders for file in _describing(folder))
        for file in {*files, *describing}:
            states[str(file).removeprefix(str(path))] = _state(Path(str(file)))
    text = "\n".join(f"{name}\t{state}" for name, state in sorted(states.items()))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _describing(path: Path) -> list[Path]:
    """Small files of a model that say what its tensors are, or that the output gets."""
    if not path.is_dir():
        return []
    return [file for file in path.iterdir() if file.name.endswith(_DESCRIBING) and file.is_file()]


def _state(file: Path) -> str:
    status = file.stat()
    if status.st_size < SMALL_BYTES:
        return checksum(file)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
