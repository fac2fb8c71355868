"""Folders of several models: sentence-transformers (modules.json), diffusers (model_index.json).

A listing in the folder names the sub-folders that belong to the model. Those that hold weights are
its parts.
"""

from collections.abc import Mapping
from typing import Any

from merit_fast.errors import InputError, show
from merit_fast.merge.read.files import is_directory, list_directory, open_regular, parse_json
from merit_fast.merge.read.remote import Location
from merit_fast.records import record

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_LIBRARIES = ("sentence_transformers", "diffusers", "transformers", "None")
MODULES_FILE = "modules.json"
INDEX_OF_MODELS = "model_index.json"


@record
class SeveralModels:
    """A folder of several models. Parts are sub-folders with weights; "" is the folder itself.

    ``folders``: all that the listing names. ``has_code``: it names a class outside the libraries.
    """

    path: Location
    listing: str  # the file that lists the parts
    parts: tuple[str, ...]
    folders: tuple[str, ...]
    has_code: bool


def several_models(path: Location) -> SeveralModels | None:
    """The parts of a folder of several models; None for the folder of one model.

    Raises:
        InputError: the listing is damaged, names a folder elsewhere, or none holds weights.
    """
    present = list_directory(path) if is_directory(path) else []
    listing = next((name for name in (MODULES_FILE, INDEX_OF_MODELS) if name in present), None)
    if listing is None:
        return None
    with open_regular(path / listing) as opened:
        values = parse_json(opened.read(), str(path / listing))
    folders = _of_modules(path, values) if listing == MODULES_FILE else _of_index(path, values)
    parts = tuple(folder for folder in folders if _holds_weights(path, folder))
    if not parts:
        raise InputError(f"{path / listing}: names no folder that holds weights")
    return SeveralModels(path, listing, parts, folders, _has_code(values))


def part_of(path: Location, part: str) -> Location:
    """The place of a part."""
    return path / part if part else path


def _of_modules(path: Location, values: Any) -> tuple[str, ...]:
    """Folders of [{idx, name, path, type}, ...]."""
    file = path / MODULES_FILE
    if not isinstance(values, list) or not values:
        raise InputError(f"{file}: must be a list of modules, got {show(values)}")
    folders = []
    for number, module in enumerate(values):
        folder = module.get("path") if isinstance(module, dict) else None
        if not isinstance(folder, str):
            raise InputError(f"{file}: module {number}: path: must be text, got {show(folder)}")
        folders.append(_checked(path, file, folder))
    return tuple(dict.fromkeys(folders))


def _of_index(path: Location, values: Any) -> tuple[str, ...]:
    """Folders of {NAME: [library, class], ...}; a class of null has no folder."""
    file = path / INDEX_OF_MODELS
    if not isinstance(values, Mapping):
        raise InputError(f"{file}: must be a mapping of parts, got {show(values)}")
    folders = []
    for name, value in values.items():
        is_part = isinstance(value, list) and len(value) == 2 and value[1] is not None
        if is_part and not name.startswith("_"):
            folders.append(_checked(path, file, name))
    return tuple(folders)


def _has_code(values: Any) -> bool:
    """Whether a module's type, or a part's library, is no installed library's."""
    if isinstance(values, list):
        names = [str(module.get("type", "")) for module in values]
    else:
        names = [str(value[0]) for value in values.values() if isinstance(value, list) and value]
    return any(name.partition(".")[0] not in _LIBRARIES for name in names)


def _checked(path: Location, file: Location, folder: str) -> str:
    if folder.startswith("/") or {"..", "."} & set(folder.split("/")) or "\0" in folder:
        raise InputError(f"{file}: must name folders inside {path}, got {show(folder)}")
    place = folder.strip("/")
    if place and not is_directory(path / place):
        raise InputError(f"{file}: names the folder {show(folder)}, which is absent")
    return place


def _holds_weights(path: Location, folder: str) -> bool:
    place = part_of(path, folder)
    return any(
        name.endswith(_WEIGHTS) and not is_directory(place / name) for name in list_directory(place)
    )
