"""The one policy for files next to the weights: copied, merged, or left out and named.

``companions`` says what is copied from the folder of one model. Folders of several models have
more configs of their own: every JSON, text and template is copied.
"""

import fnmatch
from collections.abc import Collection, Iterable

from merit_fast.merge.read.companions import COMPANIONS, list_companions
from merit_fast.merge.read.files import is_directory, list_directory
from merit_fast.merge.read.remote import Location

_CONFIGS = ("*.json", "*.jsonl", "*.txt", "*.jinja", "*.yaml", "*.yml", *COMPANIONS)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5")
_MADE_ANEW = (".index.json",)
# Files of earlier outputs of this package, which describe that output only.
_OWN = ("stage.json", "branch.json", "tune.json", "geometry.json", "run.json")


def is_config(name: str, has_code: bool = False) -> bool:
    """Whether a file of a folder of several models is copied; code only where a listing names it.

    Args:
        name: the file's name without its folder.
    """
    if name.endswith((*_WEIGHTS, *_MADE_ANEW)) or name in _OWN:
        return False
    if has_code and name.endswith(".py"):
        return True
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _CONFIGS)


def names_left_out(names: Iterable[str]) -> tuple[str, ...]:
    """Files that are neither copied nor merged, and whose loss a user should hear of."""
    return tuple(name for name in names if not _is_silent(name))


def files_left_out(source: Location, taken: Collection[str]) -> tuple[str, ...]:
    """Names in the folder of one model that do not reach the output; folders end with a slash.

    Args:
        taken: the files whose tensors are merged.
    """
    copied = list_companions(source)
    folders = {name.partition("/")[0] for name in copied if "/" in name}
    rest = [
        f"{name}/" if is_directory(source / name) else name
        for name in list_directory(source)
        if name not in (*copied, *taken, *folders)
    ]
    return names_left_out(rest)


def _is_silent(name: str) -> bool:
    """Hidden files, our own records, and indexes, which every merge writes itself."""
    last = name.rstrip("/").rpartition("/")[2]
    return last.startswith(".") or last in _OWN or last.endswith(_MADE_ANEW)
