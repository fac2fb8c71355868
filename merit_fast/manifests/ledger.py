"""run.json: the split in force, its branches, and every file of every output of a run."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.manifests.hashes import UNKNOWN_TIME, FileRecord, file_record
from merit_fast.manifests.io import STAGE_FILE, StageManifest, read_manifest, write_manifest
from merit_fast.manifests.locks import LOCKS_FOLDER, exclusive
from merit_fast.manifests.schemas.version import SCHEMA_VERSION
from merit_fast.manifests.stages import AUDIT, MERGE, STAGES, TRAIN
from merit_fast.records import field, record, replace

LEDGER_FILE = "run.json"
OLD_BRANCHES = f"old/{TRAIN.folder}"
UNITS_FOLDER = "units"  # parts of stages: each has a stage.json, and no record here
_DEEP = (TRAIN.folder, MERGE.folder, OLD_BRANCHES)  # folders of outputs; other outputs lie above


@record
class OutputRecord:
    """One finished output and its files."""

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]  # name -> fingerprint
    tool_versions: dict[str, str]
    seconds: float | None  # of work; None: not known
    files: dict[str, FileRecord]  # relative path -> bytes, mtime_ns, xxh3_128


@record
class Ledger:
    """run.json at the root of a run's output."""

    split: str = ""  # fingerprint of the split in force; "": none
    # Merge or single arm -> (directory in branches/, fingerprint that it must have) in order.
    branches: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    command: str = "merit-fast {stage} CONFIG.yml"  # the command that makes a stage
    outputs: dict[str, OutputRecord] = field(default_factory=dict)  # path below the root -> record
    old: dict[str, OutputRecord] = field(default_factory=dict)  # replaced branches that are kept
    inputs: dict[str, FileRecord] = field(default_factory=dict)  # absolute path of a large file
    schema_version: int = SCHEMA_VERSION


def read_ledger(root: Path) -> Ledger:
    """Reads run.json of a run.

    Raises:
        InputError: it is absent, damaged or of another schema version.
    """
    return read_manifest(Ledger, root / LEDGER_FILE)


def open_ledger(root: Path) -> tuple[Ledger, str]:
    """Reads run.json, or makes it of the outputs' stage.json files.

    Returns:
        The ledger, and why run.json could not be read ("" if it could, or if there is no output).
    """
    try:
        return read_ledger(root), ""
    except InputError as error:
        rebuilt = rebuild_ledger(root)
        return rebuilt, str(error) if rebuilt.outputs or (root / LEDGER_FILE).exists() else ""


def rebuild_ledger(root: Path) -> Ledger:
    """A ledger of the outputs that have a stage.json, without times, so that all are hashed.

    It does not know which split is in force.
    """
    folders = {stage.folder for stage in (*STAGES, AUDIT)} - set(_DEEP)
    names = [*folders, *(f"{deep}/{name}" for deep in _DEEP for name in _listed(root / deep))]
    records = {}
    for name in sorted(names):
        if not name.endswith((".tmp", ".old")) and (root / name / STAGE_FILE).exists():
            try:
                records[name] = adopt(root / name)
            except InputError:  # its next check reports the damage
                continue
    old = {name: record for name, record in records.items() if name.startswith(OLD_BRANCHES)}
    return Ledger(outputs={k: v for k, v in records.items() if k not in old}, old=old)


def adopt(directory: Path) -> OutputRecord:
    """The record that an output's own stage.json gives; every file of it is hashed when checked.

    Raises:
        InputError: stage.json is absent, damaged or of another schema version.
    """
    manifest = read_manifest(StageManifest, directory / STAGE_FILE)
    return record_of(manifest, {STAGE_FILE: file_record(directory / STAGE_FILE)})


def record_of(
    manifest: StageManifest, known: Mapping[str, FileRecord], seconds: float | None = None
) -> OutputRecord:
    """The record of an output whose stage.json is ``manifest``; ``known``: records with times."""
    files = {name: (size, UNKNOWN_TIME, digest) for name, (size, digest) in manifest.files.items()}
    return OutputRecord(
        manifest.stage,
        manifest.fingerprint,
        manifest.config,
        manifest.inputs,
        manifest.tool_versions,
        seconds,
        files | dict(known),
    )


def update_ledger(root: Path, change: Callable[[Ledger], Ledger]) -> Ledger:
    """Applies ``change`` to run.json, one process at a time; writes only what has changed."""
    with exclusive(root / LOCKS_FOLDER / LEDGER_FILE):
        try:
            before: Ledger | None = read_ledger(root)
        except InputError:
            before = None
        after = change(before or rebuild_ledger(root))
        if after != before:
            for dead in root.glob(f"{LEDGER_FILE}.*.tmp"):  # of writers that were killed
                dead.unlink(missing_ok=True)
            write_manifest(after, root / LEDGER_FILE)
    return after


def rewrite_file(root: Path, name: str, file: str, write: Callable[[], None]) -> None:
    """Lets ``write`` replace one file of a finished output, whose records then hold the new one.

    Args:
        root: the run.
        name: the output's path below it.
        file: the file's path below the output.
        write: replaces the file.
    """
    write()
    directory = root / name
    size, time, digest = file_record(directory / file)
    manifest = read_manifest(StageManifest, directory / STAGE_FILE)
    files = manifest.files | {file: (size, digest)}
    write_manifest(replace(manifest, files=files), directory / STAGE_FILE)
    stage_record = file_record(directory / STAGE_FILE)

    def change(ledger: Ledger) -> Ledger:
        record = ledger.outputs.get(name)
        if record is None or record.fingerprint != manifest.fingerprint:
            record = adopt(directory)
        known = record.files | {file: (size, time, digest), STAGE_FILE: stage_record}
        return with_output(ledger, name, replace(record, files=known))

    update_ledger(root, change)


def with_output(ledger: Ledger, name: str, record: OutputRecord | None) -> Ledger:
    """The ledger with another record of one output; None: without it."""
    outputs = {key: value for key, value in ledger.outputs.items() if key != name}
    return replace(ledger, outputs=outputs if record is None else {**outputs, name: record})


def with_old(ledger: Ledger, name: str, record: OutputRecord | None) -> Ledger:
    """The ledger with another record of one branch below ``old/``; None: without it."""
    old = {key: value for key, value in ledger.old.items() if key != name}
    return replace(ledger, old=old if record is None else {**old, name: record})


def _listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []
