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
BEST_FILE = "best.safetensors"  # the weights of the best measurement on held-out rows


@dataclass(frozen=True)
class Position:
    """Optimizer steps done and counts so far."""

    step: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    losses: tuple[float, ...] = ()  # mean per target token, of every step
    held_out: tuple[float, ...] = ()  # mean per target token, of every measurement

    @property
    def best(self) -> int | None:
        """Number of the measurement of the lowest loss, the first of equals; None: none yet."""
        return self.held_out.index(min(self.held_out)) if self.held_out else None


def write_checkpoint(
    directory: Path, tensors: Mapping[str, Tensor], position: Position, name: str = _FILE
) -> None:
    """Replaces the directory's checkpoint; a crash leaves either the old or the new one.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    temporary = directory / f"{name}.tmp"
    # Tied weights may share memory, which the format forbids.
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, temporary, {"run": _dump(position)})
        replace_file(temporary, directory / name)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{directory / name}: cannot be written ({one_line(error)}); the branch resumes from "
            "its last checkpoint"
        ) from None


def read_checkpoint(
    directory: Path, name: str = _FILE
) -> tuple[dict[str, Tensor], Position] | None:
    """The directory's checkpoint, or None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = directory / name
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            run = json.loads((file.metadata() or {})["run"])
            run = {k: tuple(v) if isinstance(v, list) else v for k, v in run.items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, Position(**run)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not a readable checkpoint ({one_line(error)}); remove it to train the "
            "branch from its start"
        ) from None


def remove_checkpoint(directory: Path) -> None:
    """Removes the directory's checkpoint and best weights, also those that were being written."""
    for name in (_FILE, BEST_FILE):
        (directory / name).unlink(missing_ok=True)
        (directory / f"{name}.tmp").unlink(missing_ok=True)


def _dump(position: Position) -> str:
    return json.dumps(vars(position))
