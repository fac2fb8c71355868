"""Finished outputs in a store: what is there, copies of it here, and copies of ours there.

    outputs/NAME/attempt-DIGEST/FILE  the files of one attempt at an output, its stage.json last
    finished/NAME/FINGERPRINT.json    the stage.json of the attempt that counts, written after them
    configs/DIGEST.yml                the config that a driver's units read

An attempt's DIGEST is that of its stage.json, which holds the hash of every file. So equal attempts
share their objects, unequal ones never mix, and one of several attempts at once is the output.
"""

import functools
import hashlib
import os
from pathlib import Path

from merit_fast.errors import InputError, MeritFastError, no_space, write_error
from merit_fast.manifests.atomic import link_file
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest
from merit_fast.manifests.stages import TRAIN
from merit_fast.merge.read.remote import RemotePath
from merit_fast.pipeline.storage.place import create_object, list_objects, read_object, request
from merit_fast.threads import map_in_threads

OUTPUTS = "outputs"
FINISHED = "finished"
CONFIGS = "configs"
ATTEMPT = "attempt-"  # begins the name of an attempt's folder
_BRANCHES = f"{TRAIN.folder}/"  # a branch's fingerprint covers its content, and no name
_THREADS = 4  # files at a time
# s3fs would hold 10 parts of 50 MiB in memory for each file.
_SENDING: dict[str, dict[str, int]] = {"s3": {"chunksize": 16 << 20, "max_concurrency": 2}}


class OutputStore:
    """The finished outputs below a place, as they were at the last ``look``.

    Attributes:
        place: the place.
        downloaded: bytes of files that this object has fetched.
        uploaded: bytes of files that it has sent.
    """

    def __init__(self, place: RemotePath) -> None:
        self.place = place
        self.downloaded = 0
        self.uploaded = 0
        self._names: dict[str, set[str]] = {}  # fingerprint -> names of outputs
        self._texts: dict[RemotePath, str] = {}  # marker -> stage.json

    def copied_bytes(self) -> dict[str, int]:
        """Bytes of files that this object has fetched and sent, by the names of units.jsonl."""
        return {"downloaded_bytes": self.downloaded, "uploaded_bytes": self.uploaded}

    def look(self) -> None:
        """Asks the store which outputs are finished: one request for a thousand of them.

        Raises:
            InputError, MeritFastError: the store cannot be read.
        """
        for path in list_objects(self.place / FINISHED):
            name, _, fingerprint = path.removesuffix(".json").rpartition("/")
            if path.endswith(".json"):
                self._names.setdefault(fingerprint, set()).add(name)

    def has(self, name: str, fingerprint: str) -> bool:
        """Whether an output is finished; a branch may have another branch's name there."""
        return self._name_there(name, fingerprint) is not None

    def folder(self, name: str, fingerprint: str) -> RemotePath:
        """The place of a finished output's files."""
        marker = self._finished(name, fingerprint)
        return self._attempt(self._name_of(marker), self.stage_text(name, fingerprint))

    def stage_text(self, name: str, fingerprint: str) -> str:
        """The stage.json of a finished output.

        Raises:
            MeritFastError: the output is not finished there, or gone since the last look.
        """
        marker = self._finished(name, fingerprint)
        if marker not in self._texts:
            try:
                self._texts[marker] = read_object(marker)
            except FileNotFoundError:
                raise MeritFastError(f"{marker}: is gone") from None
        return self._texts[marker]

    def manifest(self, name: str, fingerprint: str) -> StageManifest:
        """The stage.json of a finished output, checked.

        Raises:
            InputError: it is damaged, of another schema version, or names a file elsewhere.
        """
        marker = self._finished(name, fingerprint)
        manifest = read_manifest(StageManifest, _Text(marker, self.stage_text(name, fingerprint)))
        if manifest.fingerprint != fingerprint:
            raise InputError(f"{marker}: fingerprint: must be {fingerprint}, as its name says")
        for file in manifest.files:
            if file.startswith("/") or ".." in file.split("/"):
                raise InputError(f"{marker}: files: must lie in the output, got {file!r}")
        return manifest

    def fetch(
        self, name: str, fingerprint: str, directory: Path, near: Path, whole: bool = True
    ) -> None:
        """Fills ``directory`` with the files of a finished output; each is proved by its hash.

        Args:
            name: the output's path below the run.
            fingerprint: the output's.
            directory: files in it that agree stay.
            near: an earlier copy; files of it that agree become hard links.
            whole: False: JSON files only.

        Raises:
            MeritFastError: a file is absent there or has another content, or a request fails.
        """
        folder = self.folder(name, fingerprint)
        files = wanted_files(self.manifest(name, fingerprint), whole)

        def fetch_one(file: str) -> int:
            size, digest = files[file]
            target = directory / file
            if _agrees(target, size, digest):
                return 0
            target.parent.mkdir(parents=True, exist_ok=True)
            if _agrees(near / file, size, digest):
                link_file(near / file, target)
                return 0
            return _download(folder / file, target, size, digest)

        self.downloaded += sum(map_in_threads(fetch_one, files, _THREADS))

    def push(self, directory: Path, name: str) -> bool:
        """Sends a finished output and marks it as finished, unless one of its kind is there.

        Args:
            directory: the output.
            name: its path below the run.

        Returns:
            Whether this attempt is the output; another process may have been faster.

        Raises:
            InputError, MeritFastError: a request fails.
        """
        text = (directory / STAGE_FILE).read_text(encoding="utf-8")
        manifest = read_manifest(StageManifest, directory / STAGE_FILE)
        folder = self._attempt(name, text)
        present = list_objects(folder)
        sizes = {file: size for file, (size, _) in manifest.files.items()}
        missing = [file for file, size in sizes.items() if present.get(file) != size]
        map_in_threads(lambda file: self._send(directory / file, folder / file), missing, _THREADS)
        self._send(directory / STAGE_FILE, folder / STAGE_FILE)
        self.uploaded += sum(sizes[file] for file in missing)
        marker = self._marker(name, manifest.fingerprint)
        is_first = create_object(marker, text)
        if not is_first and self._attempt(name, read_object(marker)).path != folder.path:
            self.remove([folder / file for file in (*sizes, STAGE_FILE)])
        self._names.setdefault(manifest.fingerprint, set()).add(name)
        return is_first

    def put_config(self, text: str) -> RemotePath:
        """Writes a config under a digest of its text and returns its place."""
        path = self.place / CONFIGS / f"{_digest(text)}.yml"
        create_object(path, text)
        return path

    def remove(self, paths: list[RemotePath]) -> None:
        """Removes objects; those that are gone already do not count."""
        for path in paths:
            try:
                request(path, functools.partial(path.store.rm_file, path.path))
            except FileNotFoundError:
                continue

    def used_folders(self) -> set[str]:
        """Paths below the place of the files of every output that is finished."""
        start = len(self.place.path) + 1
        outputs = [(name, print_) for print_, names in self._names.items() for name in names]
        return {self.folder(*output).path[start:] for output in outputs}

    def _send(self, file: Path, target: RemotePath) -> None:
        protocol = target.url.partition("://")[0]
        options = _SENDING.get(protocol, {})
        request(target, lambda: target.store.put_file(str(file), target.path, **options))

    def _name_there(self, name: str, fingerprint: str) -> str | None:
        names = self._names.get(fingerprint, set())
        if name in names:
            return name
        branches = [other for other in names if other.startswith(_BRANCHES)]
        return min(branches, default=None) if name.startswith(_BRANCHES) else None

    def _finished(self, name: str, fingerprint: str) -> RemotePath:
        there = self._name_there(name, fingerprint)
        if there is None:
            raise MeritFastError(f"{self.place}: has no finished {name} of this config and input")
        return self._marker(there, fingerprint)

    def _name_of(self, marker: RemotePath) -> str:
        start = len((self.place / FINISHED).path) + 1
        return marker.path[start:].rpartition("/")[0]

    def _marker(self, name: str, fingerprint: str) -> RemotePath:
        return self.place / FINISHED / name / f"{fingerprint}.json"

    def _attempt(self, name: str, stage_text: str) -> RemotePath:
        return self.place / OUTPUTS / name / f"{ATTEMPT}{_digest(stage_text)}"


class _Text:
    """A text that ``read_manifest`` reads; errors name its place."""

    def __init__(self, place: RemotePath, text: str) -> None:
        self.place = place
        self.text = text

    def __str__(self) -> str:
        return str(self.place)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.text


def wanted_files(manifest: StageManifest, whole: bool) -> dict[str, tuple[int, str]]:
    """File -> bytes and hash of an output's files; ``whole`` is False: of its JSON files."""
    files = manifest.files
    return dict(files) if whole else {n: f for n, f in files.items() if n.endswith(".json")}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _agrees(file: Path, size: int, digest: str) -> bool:
    return file.is_file() and file.stat().st_size == size and checksum(file) == digest


def _download(source: RemotePath, target: Path, size: int, digest: str) -> int:
    """Copies an object to ``target`` and returns its bytes.

    Raises:
        MeritFastError: it is absent, or is not as its output's stage.json has it, or the disk is
            full.
    """
    part = target.with_name(f"{target.name}.part")

    def get() -> None:
        try:
            source.store.get_file(source.path, str(part))
        except OSError as error:
            if no_space(error):
                part.unlink(missing_ok=True)
                raise write_error(target, error) from None
            raise

    try:
        request(source, get)
    except FileNotFoundError:
        raise MeritFastError(f"{source}: is absent, and its output counts as finished") from None
    found = part.stat().st_size
    wrong = f"{found:,} bytes instead of {size:,}" if found != size else ""
    if not wrong and checksum(part) != digest:
        wrong = "has the same size and other content"
    if wrong:
        part.unlink()
        raise MeritFastError(f"{source}: {wrong}")
    os.replace(part, target)
    return size
