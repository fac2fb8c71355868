"""Token and example counts of trained models: from branch.json, a Trainer's state, or an export."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from merit_fast.errors import InputError, show
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.files import folder_of, read_json
from merit_fast.merge.read.remote import Location
from merit_fast.records import record

Unit = Literal["tokens", "samples"]

BRANCH_FILE = "branch.json"
STATE_FILE = "trainer_state.json"  # of transformers' Trainer
EXPORT_FILE = "groups.json"  # of `merit-fast export`


@record
class Counts:
    """One count per model, [K], and their origin in one clause."""

    numbers: tuple[float, ...]
    source: str


def read_counts(models: Sequence[Location], unit: Unit) -> Counts:
    """The counts of all models from the first source that every one of them has.

    1. branch.json: target tokens, or examples.
    2. trainer_state.json, for tokens: ``num_input_tokens_seen``. These are input tokens, prompts
       and maybe padding among them, and not the tokens in the loss.
    3. groups.json of the export that lists the model: the target tokens, or the rows, of its group,
       times the epochs of trainer_state.json where every model has one.

    Raises:
        InputError: no source has all models, branches have different starts, or a count is not
            positive.
    """
    sources: list[Callable[[Sequence[Location], Unit], Counts | None]] = [
        _of_branches,
        _of_states,
        _of_export,
    ]
    for source in sources:
        counts = source(models, unit)
        if counts is not None:
            return counts
    lacking = next(model for model in models if not has_branch(model))
    others = f"{STATE_FILE} with num_input_tokens_seen or an" if unit == "tokens" else "an"
    rule = (
        f"{lacking}: has no {BRANCH_FILE} to take its {unit} from, and not every model has "
        f"{'a ' if unit == 'tokens' else ''}{others} export's {EXPORT_FILE}"
    )
    raise OptionError(rule, "weights", "give {} as uniform or as numbers")


def has_branch(model: Location) -> bool:
    """Whether a branch.json lies next to the model."""
    return bool((folder_of(model) / BRANCH_FILE).is_file())


def _of_branches(models: Sequence[Location], unit: Unit) -> Counts | None:
    if not all(has_branch(model) for model in models):
        return None
    branches = [read_manifest(BranchManifest, folder_of(model) / BRANCH_FILE) for model in models]
    for model, branch in zip(models, branches, strict=True):
        if branch.start_fingerprint != branches[0].start_fingerprint:
            raise InputError(
                f"{model / BRANCH_FILE}: start_fingerprint: must be "
                f"{branches[0].start_fingerprint} as in {models[0]}, "
                f"got {branch.start_fingerprint}"
            )
    counts = [b.num_target_tokens if unit == "tokens" else b.num_examples for b in branches]
    for model, count in zip(models, counts, strict=True):
        if count <= 0:
            raise InputError(
                f"{model / BRANCH_FILE}: {unit} must be positive to weigh the merge, got {count}"
            )
    words = {"tokens": "token counts", "samples": "example counts"}
    return Counts(tuple(map(float, counts)), f"{words[unit]} of each {BRANCH_FILE}")


def _of_states(models: Sequence[Location], unit: Unit) -> Counts | None:
    if unit != "tokens":
        return None
    counts = []
    for model in models:
        seen = _positive(_state(model).get("num_input_tokens_seen"))
        if not seen:
            return None
        counts.append(seen)
    source = (
        f"num_input_tokens_seen of each {STATE_FILE}: input tokens, prompts among them, and not "
        "the tokens in the loss"
    )
    return Counts(tuple(counts), source)


def _of_export(models: Sequence[Location], unit: Unit) -> Counts | None:
    files = {_export_of(model) for model in models}
    file = next(iter(files))
    if len(files) != 1 or file is None:
        return None
    key = "num_target_tokens" if unit == "tokens" else "num_rows"
    groups = {_resolved(group["model"]): group.get(key) for group in _groups(file)}
    numbers = []
    for model in models:
        count = groups[_resolved(model)]
        if not _positive(count):
            raise InputError(f"{file}: {key} of {model}: must be above 0, got {show(count)}")
        numbers.append(_positive(count))
    epochs = [_epochs(model) for model in models]
    if all(epochs):
        numbers = [count * epoch for count, epoch in zip(numbers, epochs, strict=True)]
        return Counts(tuple(numbers), f"{key} of {file}, times the epochs of each {STATE_FILE}")
    return Counts(tuple(numbers), f"{key} of {file}, in one epoch of its rows")


def _epochs(model: Location) -> float:
    """Epochs of the model's training; 0: not known."""
    return _positive(_state(model).get("epoch"))


def _positive(value: Any) -> float:
    """The number if it is finite and above 0; else 0: a state that was cut or edited tells none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < math.inf else 0.0


def _export_of(model: Location) -> Path | None:
    """The groups.json above a model's folder that lists it."""
    folder = folder_of(model)
    if not isinstance(folder, Path):
        return None
    for parent in list(folder.resolve().parents)[:3]:
        file = parent / EXPORT_FILE
        if file.is_file() and any(_resolved(g["model"]) == _resolved(model) for g in _groups(file)):
            return file
    return None


def _groups(file: Path) -> list[dict[str, Any]]:
    """The groups of an export.

    Raises:
        InputError: the file is damaged.
    """
    groups = read_json(file).get("groups")
    is_list = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("model"), str) for group in groups
    )
    if not is_list:
        raise InputError(f"{file}: groups: must be a list of groups that name their model")
    found: list[dict[str, Any]] = groups  # type: ignore[assignment]
    return found


def _resolved(model: Location | str) -> str:
    location = Path(model) if isinstance(model, str) else folder_of(model)
    return str(location.resolve()) if isinstance(location, Path) else str(location)


def _state(model: Location) -> dict[str, Any]:
    file = folder_of(model) / STATE_FILE
    return read_json(file) if file.is_file() else {}
