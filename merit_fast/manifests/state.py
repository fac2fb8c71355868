"""The state of one output of a run, and the reasons why a stage runs again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from merit_fast.errors import InputError, show
from merit_fast.manifests.hashes import Damage, compare_files
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest
from merit_fast.manifests.ledger import Ledger, OutputRecord, adopt
from merit_fast.manifests.stages import AUDIT, STAGES
from merit_fast.records import record, replace

_SHOWN = 40  # characters of a value that the reason for a stage quotes
State = Literal["up to date", "absent", "damaged", "other config", "foreign"]
AGAIN = {
    "sketch": "sketching again",
    "split": "splitting again",
    "train": "training again",
    "merge": "merging again",
    "evaluate": "evaluating again",
    "audit": "auditing again",
    "report": "writing it again",
}
_SECTIONS = {stage.name: stage.section or stage.name for stage in (*STAGES, AUDIT)}


@record
class OutputState:
    """The state of an output; ``detail`` names a file and its damage."""

    state: State
    detail: str = ""
    record: OutputRecord | None = None
    is_surplus: bool = False  # a file that belongs to nobody makes the damage

    @property
    def is_current(self) -> bool:
        return self.state == "up to date"


def check_output(
    root: Path,
    name: str,
    fingerprint: str | None,
    ledger: Ledger,
    whole: bool = False,
    partial: bool = False,
) -> OutputState:
    """Compares an output with the ledger, or with its own stage.json if the ledger lacks it.

    Args:
        root: the run.
        name: the output's path below it.
        fingerprint: the one that the output must have; None: any.
        ledger: the run's ledger.
        whole: hash every file.
        partial: files that are no JSON may be absent; they lie in a store.

    Returns:
        The state. Its record has the present mtimes of all files if nothing is wrong.
    """
    directory = root / name
    if not directory.exists():
        return OutputState("absent")
    foreign = OutputState("foreign", f"{directory}: exists and is not an output of merit-fast")
    if not directory.is_dir():
        return foreign
    try:
        record = _record(directory, ledger.outputs.get(name) or ledger.old.get(name))
    except InputError as error:
        if (directory / STAGE_FILE).exists():
            return OutputState("damaged", str(error).removeprefix(f"{root}/"))
        return foreign
    if fingerprint is not None and record.fingerprint != fingerprint:
        return OutputState("other config", "", record)
    recorded = record.files
    if partial:
        recorded = {
            file: known
            for file, known in recorded.items()
            if file.endswith(".json") or (directory / file).exists()
        }
    damage, files = compare_files(directory, recorded, whole)
    if damage is not None:
        return OutputState("damaged", _describe(name, damage), record, damage.is_surplus)
    return OutputState("up to date", "", replace(record, files=files))


def differences(old: Mapping[str, Any], new: StageManifest, old_inputs: Mapping[str, str]) -> str:
    """Keys in which an output's config and inputs differ from those of a stage about to run."""
    section = _SECTIONS[new.stage]
    before = _flat(old, section)
    after = _flat(new.config, section)
    keys = dict.fromkeys((*before, *after))
    changed = [
        _change(key, before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
    ]
    names = dict.fromkeys((*old_inputs, *new.inputs))
    inputs = [name for name in names if old_inputs.get(name) != new.inputs.get(name)]
    if inputs:
        changed.append(f"{', '.join(inputs)} changed")
    return "; ".join(changed) or "made by another version of merit_fast"


def replaced_keys(path: Path, manifest: StageManifest) -> str:
    """Keys in which the output at ``path`` differs from ``manifest``; "" if there is none."""
    if not (path / STAGE_FILE).exists():
        return ""
    try:
        old = read_manifest(StageManifest, path / STAGE_FILE)
    except InputError as error:
        return str(error).removeprefix(f"{path}/")
    if old.fingerprint == manifest.fingerprint:
        return ""
    return differences(old.config, manifest, old.inputs)


def _record(directory: Path, recorded: OutputRecord | None) -> OutputRecord:
    """The ledger's record, or that of stage.json where the ledger knows less or another output."""
    if recorded is None:
        return adopt(directory)
    try:
        manifest = read_manifest(StageManifest, directory / STAGE_FILE)
    except InputError:
        return recorded  # the comparison of the files reports stage.json
    return recorded if manifest.fingerprint == recorded.fingerprint else adopt(directory)


def _describe(name: str, damage: Damage) -> str:
    return f"{name}/{damage.file}: {damage.found}"


def _change(key: str, before: Any, after: Any) -> str:
    texts = show(before), show(after)
    return f"{key} changed" if max(map(len, texts)) > _SHOWN else f"{key} {' -> '.join(texts)}"


def _flat(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}.{key}")
        else:
            flat[f"{prefix}.{key}"] = value
    return flat
