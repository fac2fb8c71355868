"""Checkpoints of a training run: one file, replaced atomically."""

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from merit_fast.errors import InputError, one_line, write_error
from merit_fast.manifests.atomic import replace_file
from merit_fast.train.parallel.files import fill_tensor, write_tensors
from merit_fast.train.parallel.pieces import is_divided
from merit_fast.train.parallel.ranks import ONE_PROCESS, Ranks

_FILE = "resume.safetensors"
_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError)
Fill = Callable[[str, Tensor], None]
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
    directory: Path,
    tensors: Mapping[str, Tensor],
    position: Position,
    name: str = _FILE,
    ranks: Ranks = ONE_PROCESS,
) -> None:
    """Replaces the directory's checkpoint; a crash leaves either the old or the new one.

    The file is the same for whole and divided tensors. ``ranks`` are the processes that divide
    them: each calls this function, and the leader writes.

    Raises:
        InputError: the disk cannot be written.
        MeritFastError: it is full; the branch resumes from its last checkpoint.
    """
    temporary = directory / f"{name}.tmp"
    try:
        write_tensors(temporary, tensors, {"run": _dump(position)}, ranks)
        if ranks.leads:
            replace_file(temporary, directory / name)
        if any(is_divided(tensor) for tensor in tensors.values()):
            ranks.wait()  # every process may read the file next
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(directory / name, error) from None


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, _position(file)
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def fill_from_checkpoint(
    directory: Path, fill: Callable[[Container[str], Fill], None], ranks: Ranks, name: str = _FILE
) -> Position | None:
    """Reads each process's rows of the directory's checkpoint; None if there is none.

    Args:
        directory: the branch's folder.
        fill: gets the names of the stored tensors, and a function that reads one of them.
        ranks: the processes; each calls this function.
        name: the file.

    Raises:
        InputError: the file is damaged, or its tensors are of another form.
    """
    path = directory / name
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            fill({*file.keys()}, lambda key, tensor: fill_tensor(file, key, tensor, ranks, path))
            return _position(file)
    except InputError:
        raise
    except _DAMAGE as error:
        raise _damaged(path, error) from None


def remove_checkpoint(directory: Path) -> None:
    """Removes the directory's checkpoint and best weights, also those that were being written."""
    for name in (_FILE, BEST_FILE):
        (directory / name).unlink(missing_ok=True)
        (directory / f"{name}.tmp").unlink(missing_ok=True)


def _position(file: Any) -> Position:
    run: Any = json.loads((file.metadata() or {})["run"])
    lists_as_tuples: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in run.items()}
    return Position(**lists_as_tuples)


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: is not a readable checkpoint ({one_line(error)}); remove it to train the "
        "branch from its start"
    )


def _dump(position: Position) -> str:
    return json.dumps(vars(position))
