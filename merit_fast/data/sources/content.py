"""The content behind a source, for fingerprints."""

from collections.abc import Callable
from pathlib import Path

from merit_fast.data.paths import is_url
from merit_fast.data.sources.places import files_of, is_sliced
from merit_fast.data.sources.source import Source
from merit_fast.data.sources.store import content_mark
from merit_fast.errors import InputError


def source_content(source: Source, file_hash: Callable[[Path], str]) -> list[object]:
    """A value that changes when the rows or their order may change; paths are not covered.

    A file of a store stands for itself, with its size and what the store tells about its content;
    a Hugging Face id with its split, configuration, revision and files.

    Args:
        source: the place of the rows.
        file_hash: the hash of a file's whole content.

    Raises:
        InputError: a file is missing or unreadable, or there is no such split.
    """
    files = files_of(source)
    if files is None:
        further = [source.config, source.revision, list(source.data_files)]
        return [source.path, source.split, *(further if any(further) else [])]
    content: list[object] = [
        content_mark(file) if is_url(file) else hashed(Path(file), file_hash) for file in files
    ]
    return [*content, source.split] if is_sliced(source.split) else content


def hashed(file: Path, file_hash: Callable[[Path], str]) -> str:
    """The hash of a file.

    Raises:
        InputError: the file is unreadable.
    """
    try:
        return file_hash(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
