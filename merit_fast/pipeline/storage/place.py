"""A place of outputs: its path or URL, and requests that are made again where one fails."""

import errno
import os
import random
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from merit_fast.errors import InputError, MeritFastError, no_space, one_line
from merit_fast.manifests.atomic import write_bytes
from merit_fast.merge.read.remote import RemotePath, as_location
from merit_fast.pipeline.storage.secret import without_secrets

PAUSES_S = (0.5, 2.0, 8.0)  # before a request is made again; the client retries by itself too
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")  # of botocore

T = TypeVar("T")


def open_place(text: str) -> RemotePath:
    """The place that a path or an fsspec URL names; credentials are the client's.

    A path, or a URL of the kind file://, is a folder that needs neither locks nor renames of
    folders, such as a mounted bucket.

    Raises:
        InputError: the URL holds credentials or a query, its kind is not known, or its client is
            not installed.
    """
    refuse_credentials(text)
    location = as_location(text)
    if isinstance(location, RemotePath):
        return location
    from fsspec.implementations.local import LocalFileSystem

    path = str(location.expanduser().absolute())
    return RemotePath(LocalFileSystem(auto_mkdir=True), path, path)


def refuse_credentials(text: str) -> None:
    """Refuses a URL that may hold a secret, as it will stand in files and command lines.

    Raises:
        InputError: it has a password, a query or a chain of URLs; the message shows no value.
    """
    rest = text.partition("://")[2]
    user = rest.partition("/")[0].rpartition("@")[0]
    if ":" in user or "?" in rest or "::" in text:
        raise InputError(
            "command line: --storage: must be a path or URL without password, query and '::'; the "
            "client takes credentials from its variables or files"
        )


def request(path: RemotePath, call: Callable[[], T]) -> T:
    """Makes a request; one that fails is made again after each of ``PAUSES_S``.

    Args:
        path: the object or prefix that errors name.
        call: makes the request; it may run several times.

    Raises:
        FileNotFoundError, FileExistsError: the store's answer.
        InputError: the store refuses this user.
        MeritFastError: every try has failed.
    """
    tries = 1
    while True:
        try:
            return call()
        except (FileNotFoundError, FileExistsError, MeritFastError):
            raise
        except Exception as error:  # each store's client raises its own kinds
            if full := no_space(error):  # of a store that is a folder
                raise MeritFastError(f"{path}: {full}") from None
            reason = without_secrets(one_line(error))
            if isinstance(error, PermissionError) or type(error).__name__ in _NO_CREDENTIALS:
                raise InputError(f"{path}: may not be accessed: {reason}") from None
            if tries > len(PAUSES_S):
                raise MeritFastError(f"{path}: {reason} ({tries} tries)") from None
        time.sleep(PAUSES_S[tries - 1] * random.uniform(0.5, 1.5))
        tries += 1


def read_object(path: RemotePath) -> str:
    """The text of an object.

    Raises:
        FileNotFoundError: there is none.
        InputError, MeritFastError: see ``request``.
    """
    return request(path, lambda: bytes(path.store.cat_file(path.path)).decode())


def list_objects(prefix: RemotePath) -> dict[str, int]:
    """Path below a prefix -> bytes, of every object below it; asks the store, no cache.

    Raises:
        InputError: the bucket is absent, or see ``request``.
    """

    def find() -> dict[str, int]:
        prefix.store.invalidate_cache(prefix.path)
        entries = prefix.store.find(prefix.path, detail=True)
        start = len(prefix.path.strip("/")) + 1
        return {name.strip("/")[start:]: int(info["size"]) for name, info in entries.items()}

    try:
        return request(prefix, find)
    except FileNotFoundError as error:
        if str(error.filename or error).strip("/") == prefix.path.strip("/"):
            return {}
        raise InputError(f"{prefix}: does not exist: {one_line(error)}") from None


def create_object(path: RemotePath, text: str) -> bool:
    """Writes an object unless it is there; of several writers at once one wins.

    A store without conditional writes may let the last one win.

    Returns:
        Whether the object holds ``text``.

    Raises:
        InputError, MeritFastError: see ``request``.
    """
    data = text.encode()

    def create() -> None:
        if "file" in path.store.protocol:
            _create_here(Path(path.path), data)
            return
        try:
            path.store.pipe_file(path.path, data, mode="create")
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            if path.store.exists(path.path):
                raise FileExistsError(path.path) from None
            path.store.pipe_file(path.path, data)

    try:
        request(path, create)
        return True
    except FileExistsError:
        return read_object(path) == text  # a try that seemed to fail may have written it


def _create_here(path: Path, data: bytes) -> None:
    """Gives a complete file its name, if no other file has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    write_bytes(temporary, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a mounted bucket has no links, and a file is there when it is closed
        with path.open("xb") as file:
            file.write(data)
    finally:
        temporary.unlink()
