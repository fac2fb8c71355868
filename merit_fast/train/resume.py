"""Checkpoints to resume from: one file, written whole or not at all, the newest kept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from merit_fast.manifests.atomic import replace_file

_FILE = "resume.safetensors"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, and what it has counted so far."""

    step: int = 0
    num_examples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0
    losses: tuple[float, ...] = ()  # mean per target token, of every step


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
    """Replaces the directory's checkpoint by this one; a crash leaves the old or the new."""
    temporary = directory / f"{_FILE}.tmp"
    # Tied weights may share memory, which the format forbids.
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        temporary,
        {"run": _dump(progress)},
    )
    replace_file(temporary, directory / _FILE)


def read_checkpoint(directory: Path) -> tuple[dict[str, Tensor], Progress] | None:
    """The directory's checkpoint, or None if there is none."""
    if not (directory / _FILE).exists():
        return None
    with safe_open(directory / _FILE, framework="pt") as file:
        run = json.loads((file.metadata() or {})["run"])
        run["losses"] = tuple(run["losses"])
        return {name: file.get_tensor(name) for name in file.keys()}, Progress(**run)  # noqa: SIM118


def remove_checkpoint(directory: Path) -> None:
    (directory / _FILE).unlink(missing_ok=True)
    (directory / f"{_FILE}.tmp").unlink(missing_ok=True)


def _dump(progress: Progress) -> str:
    return json.dumps(vars(progress))
