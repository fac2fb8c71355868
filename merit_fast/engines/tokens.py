"""The tokens that a stack has trained on: by its own branch.json, else by rows and epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merit_fast.engines.files import STATE_FILE, last_checkpoint
from merit_fast.errors import MeritFastError, show
from merit_fast.export.chosen import Group
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge.read.files import read_json

BRANCH_FILE = "branch.json"


@dataclass(frozen=True)
class Trained:
    """Examples, tokens and steps that a stack has trained on.

    Attributes:
        source: the origin of the counts, in one clause.
        steps: optimizer steps; 0: not known.
        max_steps: steps that the Trainer planned; 0: not known.
        losses: the losses that the Trainer logged.
    """

    num_examples: int
    num_tokens: int
    num_target_tokens: int
    steps: int
    max_steps: int
    losses: tuple[float, ...]
    source: str


def trained_of(out: Path, group: Group, configured_epochs: float, start: str) -> Trained:
    """The counts of one branch.

        count = rows' count * epochs

    Args:
        out: the stack's output folder. A branch.json in it, as our callbacks and plugins write,
            holds measured counts. Else the epochs are those of trainer_state.json, of the folder
            or of its last checkpoint.
        group: the branch's rows, and the tokens of one epoch.
        configured_epochs: of the configuration, where there is no trainer_state.json.
        start: fingerprint of the model that the branch must have started from.

    Raises:
        MeritFastError: the branch.json is of another start, or the state holds no step.
    """
    state, where = _state_of(out)
    losses = tuple(
        float(entry["loss"]) for entry in state.get("log_history", ()) if "loss" in entry
    )
    steps = int(state.get("global_step", 0))
    max_steps = int(state.get("max_steps", 0))
    measured = _measured(out, start, steps)
    if measured is not None:
        return Trained(
            measured.num_examples,
            measured.num_tokens,
            measured.num_target_tokens,
            measured.steps or steps,
            max_steps,
            losses,
            f"measured in training ({BRANCH_FILE})",
        )
    epochs = configured_epochs
    source = f"of the rows, times {epochs:g} epochs of the configuration"
    if where is not None:
        epochs = _epochs(state, where)
        source = f"of the rows, times {epochs:g} epochs of {where.name}"
    return Trained(
        round(group.num_examples * epochs),
        round(group.num_tokens * epochs),
        round(group.num_target_tokens * epochs),
        steps,
        max_steps,
        losses,
        source,
    )


def _measured(out: Path, start: str, steps: int) -> BranchManifest | None:
    """The branch.json that a callback wrote, next to the model or to its last checkpoint.

    That of a checkpoint before the last step counts a part of the training, and is none.

    Raises:
        MeritFastError: it is of another start.
    """
    folders = (out, last_checkpoint(out))
    file = next((f / BRANCH_FILE for f in folders if f and (f / BRANCH_FILE).is_file()), None)
    if file is None:
        return None
    measured = read_manifest(BranchManifest, file)
    if measured.start_fingerprint != start:
        raise MeritFastError(
            f"{file}: start_fingerprint: must be {start}, got {measured.start_fingerprint}"
        )
    return measured if file.parent == out or measured.steps == steps else None


def _state_of(out: Path) -> tuple[Mapping[str, Any], Path | None]:
    """The Trainer's state at its end, and its file; an empty one without a file."""
    checkpoint = last_checkpoint(out)
    for folder in (out, checkpoint):
        if folder is not None and (folder / STATE_FILE).is_file():
            return read_json(folder / STATE_FILE), folder / STATE_FILE
    return {}, None


def _epochs(state: Mapping[str, Any], file: Path) -> float:
    epochs = state.get("epoch")
    if not isinstance(epochs, int | float) or epochs <= 0:
        raise MeritFastError(f"{file}: epoch: must be above 0, got {show(epochs)}")
    return float(epochs)
