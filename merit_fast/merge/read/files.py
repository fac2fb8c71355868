"""Reads untrusted files: none may crash or hang the reader, or break a message's one line.

Symbolic links are followed within a model's folder and into its hub cache, which keeps every file
behind one. A link that leads elsewhere is refused: it would put a foreign file into an output.
"""

import json
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from merit_fast.errors import InputError, one_line
from merit_fast.merge.read.remote import Location, RemotePath

MAX_JSON_BYTES = 100_000_000
_MAX_DEPTH = 100
_BLOCK_BYTES = 1 << 20

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def parse_json(text: bytes, where: str) -> Any:
    """Parses strict JSON in UTF-8 without repeated keys; ``where`` opens an error's message."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, where)
        )
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: is not UTF-8 text, byte {error.start} is {text[error.start]:#04x}"
        ) from None
    except RecursionError:
        raise InputError(f"{where}: is not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # also a number of more than 4300 digits
        raise InputError(f"{where}: is not JSON: {one_line(error)}") from None


def read_json(file: Location) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: it cannot be read, is larger than 100 MB, no JSON object or too deep to be
            written again.
    """
    with open_regular(file) as opened:
        size = size_of(opened)
        if size > MAX_JSON_BYTES:
            raise InputError(f"{file}: must hold at most {MAX_JSON_BYTES} bytes, got {size}")
        text = opened.read(size)
    values = parse_json(text, str(file))
    if not isinstance(values, dict):
        raise InputError(f"{file}: must be a JSON object, got {quote(values)}")
    level: list[Any] = [values]
    for _ in range(_MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [value for items in inner for value in items if isinstance(value, (dict, list))]
    if level:
        raise InputError(f"{file}: must be nested at most {_MAX_DEPTH} deep")
    return values


@contextmanager
def open_regular(file: Location) -> Iterator[BinaryIO]:
    """Opens a file for reading, but no pipe, device or directory: reading one could block for ever.

    Raises:
        InputError: it is none, or it cannot be opened or read, or see ``check_link``.
    """
    if isinstance(file, RemotePath):
        with file.open() as remote:
            yield remote
        return
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{file}: must be a regular file")
            check_link(file)
            with open(descriptor, "rb", closefd=False) as opened:
                yield opened
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None


def check_link(file: Path) -> None:
    """Refuses a file or folder that a link takes out of its folder, and not into its hub cache.

    The folder itself may be reached by links. The hub's cache has ``snapshots/REVISION/FILE``, a
    link into ``blobs`` next to ``snapshots``.

    Raises:
        InputError: the link leads elsewhere; the message names its target.
    """
    if not os.path.islink(file):
        return
    folder = os.path.realpath(file.parent)
    target = os.path.realpath(file)
    allowed = [folder]
    repository, is_cached, _ = folder.rpartition(f"{os.sep}snapshots{os.sep}")
    if is_cached:
        allowed.append(os.path.join(repository, "blobs"))
    if not any(target.startswith(f"{place.rstrip(os.sep)}{os.sep}") for place in allowed):
        raise InputError(
            f"{file}: must lie in its folder or in the folder's hub cache, is a link to {target}"
        )


def size_of(opened: BinaryIO) -> int:
    """Bytes of an open file, which is then at its start."""
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    return size


def copy_file(source: Location, target: Path) -> None:
    """Copies a file into a local one."""
    if isinstance(source, RemotePath):
        source.copy_to(target)
        return
    with open(source, "rb") as original, open(target, "wb") as copy:
        while block := original.read(_BLOCK_BYTES):
            copy.write(block)


def check_folder(path: Location) -> None:
    """As ``check_link``, for a folder inside a model's folder or prefix."""
    if isinstance(path, Path):
        check_link(path)


def is_directory(path: Location) -> bool:
    """False too where a local path's parent may not be read."""
    return path.is_dir() if isinstance(path, RemotePath) else os.path.isdir(path)


def is_weight_file(path: Location) -> bool:
    """Whether a model is named by a local safetensors file instead of its directory."""
    return isinstance(path, Path) and path.suffix == ".safetensors" and path.is_file()


def folder_of(path: Location) -> Location:
    """The directory of a model: where its config.json and tokenizer lie.

    A distributed checkpoint without a config.json has it in the folder above, as trainers do.
    """
    if isinstance(path, Path) and is_weight_file(path):
        return path.parent
    is_bare = (path / ".metadata").exists() and not (path / "config.json").exists()
    return path.parent if is_bare and (path.parent / "config.json").exists() else path


def list_directory(path: Location) -> list[str]:
    """The names in a directory, sorted.

    Raises:
        InputError: it is none, or may not be read.
    """
    if isinstance(path, RemotePath):
        names = sorted(path.entries(fresh=True))
        if not names:
            raise InputError(f"{path}: is not a directory")
        return names
    try:
        return sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: is not a directory") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def quote(value: object) -> str:
    """A value of a foreign JSON file as a message shows it: short and on one line."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise InputError(f"{where}: {quote(repeated)} stands twice in one object")
    return values
