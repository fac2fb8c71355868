"""Finished branches of the planned contents that have the names of other branches or datasets.

Names may change while the content stays: groups of a new split are numbered otherwise, a control
has a group that merit had before, a dataset is renamed.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.directories import recover_directory
from merit_fast.manifests.io import manifest_text, read_manifest
from merit_fast.manifests.locks import LOCKS_FOLDER, exclusive
from merit_fast.manifests.relocate import copy_output
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.manifests.stages import TRAIN
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.records import old_place
from merit_fast.progress import Progress

_BRANCH_FILE = "branch.json"


@dataclass(frozen=True)
class _Move:
    branch: Branch
    fingerprint: str
    source: Path
    target: Path
    manifest: BranchManifest  # with the new names


def adopt_branches(branches: Sequence[Branch], outputs: Outputs, progress: Progress) -> None:
    """Gives finished branches of these contents the names of ``branches``; nothing is trained.

    A crash loses no finished branch. A branch that is in the way and that nothing needs any more
    goes to the folder ``old``.
    """
    with exclusive(outputs.root / LOCKS_FOLDER / "adopt"):
        moves = list(_moves(branches, outputs))
        for move in moves:
            changed = {_BRANCH_FILE: manifest_text(move.manifest)}
            copy_output(move.source, move.target, changed)
        needed = {outputs.branch(branch).fingerprint for branch in branches}
        for move in moves:
            _commit(move, needed, outputs)
            progress.note(_sentence(move, outputs))
        targets = {move.target for move in moves}
        for move in moves:
            if move.source not in targets:
                shutil.rmtree(move.source)
                outputs.records.remove(outputs.records.name(move.source))


def relabel(path: Path, branch: Branch) -> BranchManifest | None:
    """branch.json of the finished branch in ``path`` with the names of ``branch``.

    Returns:
        None if it has these names already.
    """
    manifest = read_manifest(BranchManifest, path / _BRANCH_FILE)
    named = replace(
        manifest,
        branch=branch.name,
        arm=branch.arm,
        group=branch.group,
        datasets=branch.datasets,
    )
    return None if named == manifest else named


def _moves(branches: Sequence[Branch], outputs: Outputs) -> Iterator[_Move]:
    records = outputs.records
    ledger = records.ledger()
    known = {**ledger.old, **ledger.outputs}
    finished = {
        record.fingerprint: outputs.root / name
        for name, record in known.items()
        if record.stage == TRAIN.name
    }
    for branch in branches:
        fingerprint = outputs.branch(branch).fingerprint
        target = outputs.branch_path(branch.name)
        recover_directory(target, fingerprint)
        is_there = records.check(target, fingerprint).is_current
        source = target if is_there else finished.get(fingerprint)
        if source is None or not records.check(source, fingerprint).is_current:
            continue
        manifest = relabel(source, branch)
        if manifest is not None:
            yield _Move(branch, fingerprint, source, target, manifest)


def _commit(move: _Move, needed: set[str], outputs: Outputs) -> None:
    """Renames the finished copy; keeps a replaced branch that has no other place."""
    records = outputs.records
    name = records.name(move.target)
    before = records.check(move.target, None).record
    keep_old = None
    if before is not None and before.fingerprint not in needed:
        keep_old = old_place(outputs.root, name, before.fingerprint)
    recover_directory(move.target, move.fingerprint, keep_old)
    if not records.check(move.target, move.fingerprint, keep=True).is_current:
        raise InputError(f"{move.source}: its files changed while they were copied")
    if keep_old is not None:
        records.check(keep_old, None, keep=True)


def _sentence(move: _Move, outputs: Outputs) -> str:
    name = outputs.records.name(move.target)
    if move.source == move.target:
        return f"{name}: has other names of datasets or arm now; the branch is as before"
    source = outputs.records.name(move.source)
    return f"{name}: {source} has the same rows, start and recipe; it is taken over"
