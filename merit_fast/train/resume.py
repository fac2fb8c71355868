"""Checkpoints of a training run: one file, replaced atomically."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from merit_fast.errors import InputError, one_line
from merit_fast.manifests.atomic import replace_file

_FILE = "resume.safetensors"


@dataclass(frozen=True)
class Position:
    """Optimizer steps done and counts so far."""

    step: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    losses: tuple[float, ...] = ()  # mean per target token, of every step


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], position: Position) -> None:
    """Replaces the directory's checkpoint; a crash leaves either the old or the new one.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    temporary = directory / f"{_FILE}.tmp"
    # Tied weights may share memory, which the format forbids.
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, temporary, {"run": _dump(position)})
        replace_file(temporary, directory / _FILE)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{directory / _FILE}: cannot be written ({one_line(error)}); the branch resumes from "
            "its last checkpoint"
        ) from None


def read_checkpoint(directory: Path) -> tuple[dict[str, Tensor], Position] | None:
    """The directory's checkpoint, or None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / _FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            run = json.loads((file.metadata() or {})["run"])
            run["losses"] = tuple(run["losses"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, Position(**run)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not a readable checkpoint ({one_line(error)}); remove it to train the "
            "branch from its start"
        ) from None


def remove_checkpoint(directory: Path) -> None:
    """Removes the directory's checkpoint, also one that was being written."""
    (directory / _FILE).unlink(missing_ok=True)
    (directory / f"{_FILE}.tmp").unlink(missing_ok=True)


def _dump(position: Position) -> str:
    return json.dumps(vars(position))
