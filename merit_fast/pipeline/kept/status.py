"""The state of every output of a run, with or without its config; it changes no file."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merit_fast.errors import InputError
from merit_fast.manifests.directories import is_own_work
from merit_fast.manifests.io import STAGE_FILE, StageManifest
from merit_fast.manifests.ledger import (
    OLD_BRANCHES,
    UNITS_FOLDER,
    Ledger,
    OutputRecord,
    adopt,
    read_ledger,
)
from merit_fast.manifests.locks import LOCKS_FOLDER, owner_of, stage_lock
from merit_fast.manifests.stages import AUDIT, EVALUATE, MERGE, REPORT, SKETCH, SPLIT, STAGES, TRAIN
from merit_fast.manifests.state import OutputState, check_output, differences
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.data import TARGETS_FOLDER, TOKENS_FOLDER
from merit_fast.pipeline.outputs import Outputs

Word = Literal[
    "up to date",
    "damaged",
    "made from another config",
    "unfinished",
    "being made",
    "absent",
    "not in force",
    "foreign",
]
_FOLDERS = (TRAIN.folder, MERGE.folder, OLD_BRANCHES)  # every entry of these is an output


@dataclass(frozen=True)
class OutputStatus:
    """One output, or what is left of one."""

    name: str  # path below the run
    state: Word
    detail: str  # the file and its damage, the keys that differ, or the process that makes it
    seconds: float | None  # that it took; None: not known
    num_bytes: int


def config_status(config: RunConfig, command: str, verify: bool) -> list[OutputStatus]:
    """The state of every output of a config, and of all else that lies in the run's folders."""
    outputs = Outputs(config, command, verify)
    root = outputs.root
    ledger = outputs.records.ledger()
    expected = {outputs.records.name(path): m for path, m in _expected(outputs).items()}
    rows = [_of_config(root, name, m, ledger, verify) for name, m in expected.items()]
    others = (*_others(root, set(expected), ledger), *_units(root, rows), *_caches(outputs))
    return [*rows, *others]


def _expected(outputs: Outputs) -> dict[Path, StageManifest]:
    """Every output by its path; those after the split only if the split is up to date."""
    split = outputs.folder(SPLIT)
    expected = {outputs.folder(SKETCH): outputs.sketch, split: outputs.split}
    if outputs.config.split.warmup:
        warmup = outputs.branch_path(WARMUP)
        expected = {warmup: outputs.branch(outputs.warmup), **expected}
    if not outputs.records.check(split, outputs.split.fingerprint).is_current:
        return expected
    for branch in outputs.plan.trained:
        expected[outputs.branch_path(branch.name)] = outputs.branch(branch)
    for name in outputs.plan.merges:
        expected[outputs.merge_path(name)] = outputs.merge(name)
    expected[outputs.folder(EVALUATE)] = outputs.evaluate
    if outputs.config.evaluate.audit:
        expected[outputs.folder(AUDIT)] = outputs.audit
    expected[outputs.folder(REPORT)] = outputs.report
    return expected


def _units(root: Path, rows: Sequence[OutputStatus]) -> Iterator[OutputStatus]:
    """A row for the parts that units have made; finished stages hold them too."""
    folder = root / UNITS_FOLDER
    if not folder.is_dir():
        return
    states = {row.name: row.state for row in rows}
    is_over = all(states.get(stage.folder) == "up to date" for stage in (SKETCH, EVALUATE))
    state: Word = "not in force" if is_over else "up to date"
    detail = "parts of finished stages, and logs" if is_over else "parts of stages, and logs"
    yield OutputStatus(UNITS_FOLDER, state, detail, None, folder_bytes(folder))


def _caches(outputs: Outputs) -> Iterator[OutputStatus]:
    """Rows for tokenized datasets that this config does not use, and for sketched targets."""
    targets = outputs.root / TARGETS_FOLDER
    for path in sorted(targets.iterdir()) if targets.is_dir() else ():
        if path.is_dir():
            name = f"{TARGETS_FOLDER}/{path.name}"
            yield OutputStatus(name, "not in force", "a target of select", None, folder_bytes(path))
    folder = outputs.root / TOKENS_FOLDER
    used = {*outputs.contents.values(), *outputs.held_out_contents.values()}
    detail = "tokenized rows of another config"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and path.name not in used | {LOCKS_FOLDER}:
            name = f"{TOKENS_FOLDER}/{path.name}"
            yield OutputStatus(name, "not in force", detail, None, folder_bytes(path))


def run_status(root: Path, verify: bool) -> list[OutputStatus]:
    """The state of every output that run.json has, by the split in force and its branches.

    Raises:
        InputError: run.json is absent or damaged.
    """
    try:
        ledger = read_ledger(root)
    except InputError as error:
        raise InputError(f"{error}; write it again with: merit-fast run CONFIG.yml") from None
    rows = []
    for name, wanted in _in_force(ledger).items():
        state = check_output(root, name, None, ledger, verify)
        if state.is_current and state.record and not wanted <= _prints(state.record):
            state = OutputState("other config", "made of other branches or splits", state.record)
        rows.append(_row(root, name, state, state.detail))
    return [*rows, *_others(root, {row.name for row in rows}, ledger), *_units(root, rows)]


def _in_force(ledger: Ledger) -> dict[str, set[str]]:
    """Output -> fingerprints that must be its own or its inputs'."""
    branches = {name: digest for pairs in ledger.branches.values() for name, digest in pairs}
    wanted: dict[str, set[str]] = {SKETCH.folder: set(), SPLIT.folder: {ledger.split}}
    wanted |= {f"{TRAIN.folder}/{name}": {digest} for name, digest in branches.items()}
    for arm, pairs in ledger.branches.items():
        if f"{MERGE.folder}/{arm}" in ledger.outputs:
            wanted[f"{MERGE.folder}/{arm}"] = {digest for _, digest in pairs}
    wanted[EVALUATE.folder] = set(branches.values())
    if AUDIT.folder in ledger.outputs:
        wanted[AUDIT.folder] = set()
    evaluation = ledger.outputs.get(EVALUATE.folder)
    wanted[REPORT.folder] = {ledger.split} | ({evaluation.fingerprint} if evaluation else set())
    split = ledger.outputs.get(SPLIT.folder)
    if split:
        wanted[SKETCH.folder] = {split.inputs.get("sketch", "")}
    return wanted


def _prints(record: OutputRecord) -> set[str]:
    return {record.fingerprint, *record.inputs.values()}


def _of_config(
    root: Path, name: str, manifest: StageManifest, ledger: Ledger, verify: bool
) -> OutputStatus:
    state = check_output(root, name, manifest.fingerprint, ledger, verify)
    detail = state.detail
    if state.state == "other config" and state.record:
        detail = differences(state.record.config, manifest, state.record.inputs)
    return _row(root, name, state, detail)


def _row(root: Path, name: str, state: OutputState, detail: str) -> OutputStatus:
    words: Mapping[str, Word] = {
        "up to date": "up to date",
        "absent": "absent",
        "damaged": "damaged",
        "other config": "made from another config",
        "foreign": "foreign",
    }
    word = words[state.state]
    unfinished = root / f"{name}.tmp"
    size = folder_bytes(root / name)
    owner = owner_of(stage_lock(root, name))
    if owner is not None and not state.is_current:
        return OutputStatus(
            name, "being made", f"by {owner}", None, size + folder_bytes(unfinished)
        )
    if state.state == "absent" and is_own_work(unfinished):
        return OutputStatus(name, "unfinished", "", None, folder_bytes(unfinished))
    seconds = state.record.seconds if state.record else None
    return OutputStatus(name, word, detail, seconds, size)


def _others(root: Path, shown: set[str], ledger: Ledger) -> Iterator[OutputStatus]:
    """Rows of all else: outputs not in force, unfinished work, foreign folders."""
    tops = sorted({stage.folder for stage in (*STAGES, AUDIT)} - {TRAIN.folder, MERGE.folder})
    names = [f"{top}{suffix}" for top in tops for suffix in ("", ".tmp", ".old")]
    for folder in _FOLDERS:
        present = sorted(os.listdir(root / folder)) if (root / folder).is_dir() else []
        names += [f"{folder}/{name}" for name in present if not name.startswith(".")]
    for name in names:
        path = root / name
        if name in shown or not path.exists():
            continue
        if name.endswith(".tmp"):
            if is_own_work(path):
                yield from _unfinished(root, name, shown)
            else:
                yield OutputStatus(name, "foreign", "", None, folder_bytes(path))
            continue
        yield _not_in_force(path, name, ledger)


def _unfinished(root: Path, name: str, shown: set[str]) -> Iterator[OutputStatus]:
    final = name.removesuffix(".tmp")
    if final in shown and not (root / final).exists():
        return  # the output's own row tells
    owner = owner_of(stage_lock(root, final))
    size = folder_bytes(root / name)
    if owner is not None:
        yield OutputStatus(name, "being made", f"by {owner}", None, size)
    else:
        yield OutputStatus(name, "unfinished", "", None, size)


def _not_in_force(path: Path, name: str, ledger: Ledger) -> OutputStatus:
    record = ledger.outputs.get(name) or ledger.old.get(name)
    if record is None:
        try:
            record = adopt(path)
        except InputError as error:
            if not (path / STAGE_FILE).exists():
                return OutputStatus(name, "foreign", "", None, folder_bytes(path))
            return OutputStatus(name, "damaged", str(error), None, folder_bytes(path))
    detail = "a run with its settings takes it up again" if name.startswith(OLD_BRANCHES) else ""
    return OutputStatus(name, "not in force", detail, record.seconds, folder_bytes(path))


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a directory, hidden ones too; 0 if it is absent."""
    return sum(
        (Path(folder) / file).lstat().st_size
        for folder, _, files in os.walk(path)
        for file in files
    )
