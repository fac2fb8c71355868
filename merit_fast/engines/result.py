"""The model that a stack gives back: checked against its start, and taken over."""

from __future__ import annotations

import os
import re
from pathlib import Path

from merit_fast.engines.files import last_checkpoint
from merit_fast.errors import InputError, MeritFastError
from merit_fast.merge import MergeConfig, prepare_merge
from merit_fast.merge.read.adapters.folder import ADAPTER_CONFIG, is_adapter
from merit_fast.merge.read.checkpoint import read_checkpoint
from merit_fast.merge.read.entries import TensorEntry
from merit_fast.merge.read.files import read_json
from merit_fast.model import model_fingerprint

_NOT_TAKEN = ("training_args.bin", "merit_counts.json")  # a pickle; counts of a checkpoint
_STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state).*\.(pt|pth|bin)$")  # of a checkpoint


def result_folder(out: Path) -> Path:
    """The folder that holds the model: ``out``, or its last checkpoint if it holds none itself.

    ms-swift, for one, saves checkpoints only.
    """
    checkpoint = last_checkpoint(out)
    if checkpoint is None or _holds_model(out):
        return out
    return checkpoint if _holds_model(checkpoint) else out


def check_result(out: Path, start: Path, start_fingerprint: str) -> None:
    """Checks that ``out`` holds a model, or an adapter, that was trained from ``start``.

    Its tensors must have the names and shapes of the start's, an adapter must name the start, and
    a whole model's weights must not be the start's own.

    Raises:
        MeritFastError: it does not.
    """
    if not _holds_model(out):
        names = ", ".join(sorted(os.listdir(out))[:5]) if out.is_dir() else "no folder"
        raise MeritFastError(f"{out}: must hold a model or an adapter, found {names or 'nothing'}")
    try:
        if is_adapter(out):
            _check_base_of(out, start, start_fingerprint)
        half = [0.5]  # the base enters the sum, so that its shapes are compared
        prepare_merge([out], half, start, MergeConfig(method="task_arithmetic"))
    except InputError as error:
        raise MeritFastError(str(error)) from None
    if not is_adapter(out) and _same_weights(out, start):
        raise MeritFastError(f"{out}: holds the weights of {start}: nothing was trained")


def take_over(out: Path, directory: Path) -> None:
    """Moves the files of the model into ``directory``; checkpoints and other states stay behind.

    The base's config.json next to an adapter stays behind too: it would make the folder a model.
    """
    left = (*_NOT_TAKEN, "config.json") if is_adapter(out) else _NOT_TAKEN
    for path in sorted(out.iterdir()):
        if path.is_file() and path.name not in left and not _STATE.match(path.name):
            os.replace(path, directory / path.name)


def _holds_model(out: Path) -> bool:
    return out.is_dir() and (is_adapter(out) or (out / "config.json").is_file())


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


def _same_weights(out: Path, start: Path) -> bool:
    """Whether every tensor has the bytes of the start's; one of another dtype has others."""
    before = read_checkpoint(start).tensors
    return all(
        name in before and _bytes(entry) == _bytes(before[name])
        for name, entry in read_checkpoint(out).tensors.items()
    )


def _bytes(entry: TensorEntry) -> bytes:
    with open(str(entry.file), "rb") as stream:
        stream.seek(entry.offset)
        return stream.read(entry.num_bytes)
