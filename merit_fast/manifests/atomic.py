"""The one way to write a file: a temporary name, fsync, rename, fsync of the folder.

A crash leaves the old content or the new, never a mixture, and a rename that returned survives a
power cut.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str, fsync: bool = True) -> None:
    """Writes a UTF-8 file as ``write_bytes`` does."""
    write_bytes(path, text.encode("utf-8"), fsync)


def write_bytes(path: Path, data: bytes, fsync: bool = True) -> None:
    """Replaces a file; several processes may write the same path at once, and the last one wins.

    Without ``fsync`` a power cut may leave the file empty; a killed process leaves it whole.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.write_bytes(data)
            replace_file(temporary, path, fsync)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names ``path`` in an OSError of the block: a write names no file, a rename the temporary."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def replace_file(temporary: Path, path: Path, fsync: bool = True) -> None:
    """Renames a complete file to ``path`` in the same folder; ``fsync``: both reach the disk."""
    if fsync:
        fsync_path(temporary)
    os.replace(temporary, path)
    if fsync:
        fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_file(source: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        import shutil

        shutil.copyfile(source, target)
