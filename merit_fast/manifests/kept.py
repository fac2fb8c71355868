"""Records of finished files in an unfinished output: size, time and hash, in a file next to each.

The record is written before the file gets its name, so that a later process can prove the file.
"""

import json
import os
from pathlib import Path

from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.hashes import FileRecord, checksum, file_record

RECORD_SUFFIX = ".xxh3_128"


def write_record(final: Path, written: Path, digest: str | None = None) -> None:
    """Records the complete file ``written``, which is about to be renamed to ``final``.

    Args:
        digest: the file's hash; None: it is taken now.
    """
    put_record(final, file_record(written, digest))


def put_record(final: Path, record: FileRecord) -> None:
    """Writes the record of ``final``.

    A power cut may take the record away: then the file counts as not proved.
    """
    write_text(record_of_file(final), json.dumps(record), fsync=False)


def read_record(final: Path) -> FileRecord | None:
    """The record of a file; None where there is none, or it is damaged."""
    try:
        size, time, digest = json.loads(record_of_file(final).read_text())
    except (OSError, ValueError, TypeError):
        return None
    return size, time, digest


def is_proved(final: Path) -> bool:
    """Whether a file has exactly the content of its record; the whole file is hashed."""
    record = read_record(final)
    if record is None or not final.is_file() or final.stat().st_size != record[0]:
        return False
    return checksum(final) == record[2]


def read_records(directory: Path) -> dict[str, FileRecord]:
    """All records of a directory, by the name of their file."""
    records = {}
    for name in _record_names(directory):
        final = name.removesuffix(RECORD_SUFFIX)
        record = read_record(directory / final)
        if record is not None:
            records[final] = record
    return records


def remove_records(directory: Path) -> None:
    """Removes all records of a directory, which a finished output does not need."""
    for name in _record_names(directory):
        (directory / name).unlink()


def _record_names(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.endswith(RECORD_SUFFIX)]


def record_of_file(final: Path) -> Path:
    """The file next to ``final`` that holds its record."""
    return final.with_name(final.name + RECORD_SUFFIX)
