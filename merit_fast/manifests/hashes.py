"""Content hashes of files, and the comparison of a folder with the files it must hold."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from merit_fast.records import record
from merit_fast.threads import map_in_threads

FileRecord = tuple[int, int, str]  # bytes, mtime_ns, xxh3_128
UNKNOWN_TIME = -1  # a mtime_ns that no file has: the next check hashes the file
SMALL_BYTES = 1 << 20  # files below this size are hashed in every check
_RECENT_NS = 2_000_000_000  # a file this young may change again without another mtime
_THREADS = 4
_NOT_HIDDEN = (".metadata",)  # of torch's distributed checkpoints
_BLOCK_BYTES = 1 << 20


@record
class Damage:
    """One file that is not as it was written."""

    file: str  # relative to the output
    found: str  # words that follow the file's name and a colon
    is_surplus: bool = False  # the output has no such file


def checksum(file: Path) -> str:
    """XXH3, 128 bits, of a whole file in hex."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(file, "rb", buffering=0) as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


def file_record(file: Path, digest: str | None = None) -> FileRecord:
    """Size, time and hash of a file; ``digest`` is a hash that was taken while it was written."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, digest or checksum(file)


def list_files(directory: Path) -> list[str]:
    """Relative paths of all files below; hidden ones (names with a leading dot) do not count."""
    found = []
    for folder, folders, files in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(folder).relative_to(directory)
        shown = [name for name in files if not name.startswith(".") or name in _NOT_HIDDEN]
        found += [(inside / name).as_posix() for name in shown]
    return sorted(found)


def record_files(
    directory: Path, known: Mapping[str, FileRecord] | None = None
) -> dict[str, FileRecord]:
    """Hashes every file below, by relative path; files of a known size and mtime are believed."""
    names = list_files(directory)
    known = known or {}

    def record_of(name: str) -> FileRecord:
        file = directory / name
        status = file.stat()
        believed = known.get(name)
        if believed is not None and believed[:2] == (status.st_size, status.st_mtime_ns):
            return believed
        return file_record(file)

    return dict(zip(names, map_in_threads(record_of, names, _THREADS), strict=True))


def first_damage(directory: Path, recorded: Mapping[str, FileRecord]) -> Damage | None:
    """The first recorded file that is absent or has other content; every file is hashed."""

    def damage(name: str) -> Damage | None:
        file = directory / name
        size, _, digest = recorded[name]
        if not file.is_file():
            return Damage(name, "is absent")
        found = file.stat().st_size
        if found != size:
            return Damage(name, f"{found:,} bytes instead of {size:,}")
        return None if checksum(file) == digest else Damage(name, "has other content")

    found = map_in_threads(damage, recorded, _THREADS)
    return next(filter(None, found), None)


def compare_files(
    directory: Path, recorded: Mapping[str, FileRecord], whole: bool = False
) -> tuple[Damage | None, dict[str, FileRecord]]:
    """Compares the files below ``directory`` with their records.

    A file of equal size and mtime is believed, unless it is small. A file of another mtime is
    hashed.

    Args:
        directory: the output.
        recorded: its files.
        whole: hash every file.

    Returns:
        The first difference, and the records with the mtimes of files whose content is as before.
    """
    present = list_files(directory)
    for name in recorded:
        if name not in present:
            return Damage(name, "is absent"), {}
    for name in present:
        if name not in recorded:
            return Damage(name, "is not a file of this output", is_surplus=True), {}
    refreshed = dict(recorded)
    for name, (size, time_ns, digest) in recorded.items():
        file = directory / name
        status = file.stat()
        if status.st_size != size:
            return Damage(name, f"{status.st_size:,} bytes instead of {size:,}"), {}
        if whole or size < SMALL_BYTES or status.st_mtime_ns != time_ns:
            if checksum(file) != digest:
                return Damage(name, "has the same size and other content"), {}
            refreshed[name] = (size, status.st_mtime_ns, digest)
    return None, refreshed


class HashCache:
    """Hashes whole input files, each large one once: later calls believe size and mtime."""

    def __init__(self, known: Mapping[str, FileRecord], whole: bool = False) -> None:
        self.known = {} if whole else dict(known)
        self.fresh: dict[str, FileRecord] = {}  # computed by this object, worth keeping

    def __call__(self, file: Path) -> str:
        """The file's hash.

        Raises:
            OSError: the file cannot be read.
        """
        before = file.stat()
        key = str(file.resolve())
        cached = self.known.get(key)
        if cached and cached[:2] == (before.st_size, before.st_mtime_ns):
            return cached[2]
        digest = checksum(file)
        after = file.stat()
        unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        settled = time.time_ns() - after.st_mtime_ns > _RECENT_NS
        if unchanged and settled and after.st_size >= SMALL_BYTES:
            self.known[key] = self.fresh[key] = (after.st_size, after.st_mtime_ns, digest)
        return digest

    def folder(self, folder: Path, names: Sequence[str]) -> str:
        """The hash of many files, kept as one record; unchanged sizes and mtimes are believed.

        Args:
            folder: the folder of the files.
            names: their paths below it.

        Raises:
            OSError: a file cannot be read.
        """
        states = [(folder / name).stat() for name in names]
        times = [(name, state.st_mtime_ns) for name, state in zip(names, states, strict=True)]
        listing = int(_text_hash(repr(times))[:15], 16)
        num_bytes = sum(state.st_size for state in states)
        key = f"{folder.resolve()}{os.sep}"
        cached = self.known.get(key)
        if cached and cached[:2] == (num_bytes, listing):
            return cached[2]
        digest = folder_checksum(folder, names)
        newest = max((state.st_mtime_ns for state in states), default=0)
        if time.time_ns() - newest > _RECENT_NS:
            self.known[key] = self.fresh[key] = (num_bytes, listing, digest)
        return digest


def folder_checksum(folder: Path, names: Sequence[str]) -> str:
    """XXH3, 128 bits, of the names and the contents of files below a folder, in hex."""
    hashes = map_in_threads(lambda name: checksum(folder / name), names, _THREADS)
    return _text_hash(repr(list(zip(names, hashes, strict=True))))


def _text_hash(text: str) -> str:
    import xxhash

    return str(xxhash.xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest())
