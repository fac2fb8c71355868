"""Finds what a path in a file of settings names: it counts from that file's folder."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from merit_fast.data.paths import is_hub_id, is_url
from merit_fast.errors import InputError


def locate(text: str, folder: Path, where: str, *, may_be_id: bool = True) -> str:
    """A path that counts from ``folder``; a URL or an id of the hub stays as it is.

    Args:
        text: the path as the user wrote it.
        folder: the folder of the file that holds it.
        where: file and key, for error messages.
        may_be_id: whether a text that names no file may be an id of the hub.

    Raises:
        InputError: the path is there from the current directory, but not from ``folder``.
    """
    if is_url(text):
        return text
    path = Path(text).expanduser()
    from_folder = folder / path
    if from_folder.exists():
        return os.path.normpath(from_folder)
    if path.exists():
        raise InputError(
            f"{where}: {text} is not in {folder.absolute()} but in {Path.cwd()}; "
            "paths in a YAML count from its folder"
        )
    if may_be_id and is_hub_id(text, folder):
        return text
    return str(from_folder.absolute())


def absolute(text: str, folder: Path, where: str) -> str:
    """The place of rows as ``locate`` finds it, with an absolute path where it is local."""
    located = locate(text, folder, where)
    is_local = not is_url(located) and (Path(located).exists() or not is_hub_id(located, folder))
    return os.path.abspath(located) if is_local else located


def absolute_path(text: str, folder: Path, where: str) -> str:
    """The absolute path of a local file or folder that ``locate`` finds."""
    return os.path.abspath(locate(text, folder, where, may_be_id=False))


def dataset_name(text: str, taken: Collection[str] = ()) -> str:
    """The text as a dataset's name that is not taken: other characters become "-"."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-") or "rows"
    name = base
    number = 2
    while name in taken:
        name = f"{base}-{number}"
        number += 1
    return name
