"""The model that a stack gives back: checked against its start, and taken over."""

from __future__ import annotations

import os
from pathlib import Path

from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.hashes import checksum
from merit_fast.merge import MergeConfig, prepare_merge
from merit_fast.merge.read.adapters.adapter import is_adapter
from merit_fast.merge.read.adapters.config import ADAPTER_CONFIG
from merit_fast.merge.read.files import read_json
from merit_fast.model import model_fingerprint

_NOT_TAKEN = ("training_args.bin",)  # a pickle
_WEIGHTS = (".safetensors", ".bin")


def check_result(out: Path, start: Path, start_fingerprint: str) -> None:
    """Checks that ``out`` holds a model, or an adapter, that was trained from ``start``.

    Its tensors must have the names and shapes of the start's, an adapter must name the start, and
    a whole model's weights must not be the start's own.

    Raises:
        MeritFastError: it does not.
    """
    if not is_adapter(out) and not (out / "config.json").is_file():
        names = ", ".join(sorted(os.listdir(out))[:5]) if out.is_dir() else "no folder"
        raise MeritFastError(f"{out}: must hold a model or an adapter, found {names or 'nothing'}")
    try:
        if is_adapter(out):
            _check_base_of(out, start, start_fingerprint)
        prepare_merge([out], [1.0], start, MergeConfig(method="task_arithmetic"))
    except InputError as error:
        raise MeritFastError(str(error)) from None
    if not is_adapter(out) and _weights(out) == _weights(start):
        raise MeritFastError(f"{out}: holds the weights of {start}: nothing was trained")


def take_over(out: Path, directory: Path) -> None:
    """Moves the files of the model into ``directory``; checkpoints and pickles stay behind."""
    for path in sorted(out.iterdir()):
        if path.is_file() and path.name not in _NOT_TAKEN:
            os.replace(path, directory / path.name)


def _check_base_of(out: Path, start: Path, fingerprint: str) -> None:
    """Checks the base that adapter_config.json names; a name without a folder is not known here.

    Raises:
        InputError: it is another model.
    """
    name = read_json(out / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{out / ADAPTER_CONFIG}: base_model_name_or_path: must be {start}")
    folder = Path(name).expanduser()
    same = folder.is_dir() and (
        folder.resolve() == start.resolve() or model_fingerprint(folder) == fingerprint
    )
    if not same:
        raise InputError(
            f"{out / ADAPTER_CONFIG}: base_model_name_or_path: must be {start}, got {name}"
        )


def _weights(folder: Path) -> set[str]:
    files = (file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    return {checksum(file) for file in files if file.name not in _NOT_TAKEN}
