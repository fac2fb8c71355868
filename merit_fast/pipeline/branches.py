"""The work on the branches of a run: training, and the adoption of those that are trained already.

Names may change while the content stays: groups of a new split are numbered otherwise, a control
has a group that merit had before, a dataset is renamed. Then a finished branch is adopted.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.errors import InputError
from merit_fast.manifests.directories import recover_directory
from merit_fast.manifests.io import manifest_text, read_manifest
from merit_fast.manifests.locks import LOCKS_FOLDER, exclusive
from merit_fast.manifests.relocate import copy_output
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.manifests.stages import TRAIN
from merit_fast.pipeline.arms import WARMUP, Branch
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.plan import shortest_branch
from merit_fast.pipeline.records import old_place
from merit_fast.progress import Progress
from merit_fast.train.config import TrainConfig
from merit_fast.train.schedule import FEW_STEPS

if TYPE_CHECKING:
    from merit_fast.train.parallel.ranks import Ranks
    from merit_fast.train.stage import BranchJob

_BRANCH_FILE = "branch.json"
TRACKERS_FOLDER = "trackers"  # of those that write files


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


def train_planned(
    branch: Branch,
    directory: Path,
    outputs: Outputs,
    data: RunData,
    progress: Progress,
    noted: set[str],
    ranks: "Ranks | None" = None,
) -> None:
    """Trains one branch of the plan, or the warm-up, in ``directory``.

    Args:
        branch: the branch.
        directory: its output directory under its temporary name.
        outputs: paths and fingerprints of the run.
        data: rows of the run.
        progress: display of the run.
        noted: notes that the run has shown.
        ranks: the processes that train it together, this one leading; the others are in
            ``follow_leader``. None: this process only.
    """
    if branch.name != WARMUP:
        _warn_of_few_steps(outputs, progress, noted)
    if outputs.config.merge.is_tuned:
        _ = data.held_out  # too few rows fail now, not after the training
    if outputs.recipe(branch).engine != "builtin":
        from merit_fast.engines.train import train_by_engine

        train_by_engine(branch, directory, outputs, data, progress)
        return
    from merit_fast.train import train_branch

    job, recipe = _job(branch, outputs, data)
    if ranks is not None:
        ranks.tell((branch.name, str(directory)))
    train_branch(job, recipe, directory, progress, noted, ranks)


def follow_leader(outputs: Outputs, data: RunData, ranks: "Ranks") -> None:
    """Takes this process's part of every branch that the leading process trains, till it ends."""
    from merit_fast.train.stage import follow_branch

    while (message := ranks.tell(None)) is not None:
        name, directory = message
        job, recipe = _job(outputs.branches[name], outputs, data)
        follow_branch(job, recipe, Path(directory), ranks)


def _job(branch: Branch, outputs: Outputs, data: RunData) -> "tuple[BranchJob, TrainConfig]":
    from merit_fast.train.stage import BranchJob

    start, start_fingerprint = outputs.start_of(branch)
    recipe = outputs.recipe(branch)
    job = BranchJob(
        branch=branch.name,
        arm=branch.arm,
        group=branch.group,
        datasets=branch.choose(data.train, outputs.config.split),
        start_path=str(start),
        base_fingerprint=outputs.base_fingerprint,
        start_fingerprint=start_fingerprint,
        steps=branch.steps,
        row_length=outputs.config.data.max_length,
        data=outputs.config.data,
        held_out=() if recipe.evaluate_steps is None else tuple(data.watched),
        tracked=outputs.root / TRACKERS_FOLDER / branch.name,
    )
    shard = "none" if branch.name == WARMUP else outputs.shard  # the warm-up has one process
    return job, replace(recipe, report_to=outputs.config.train.report_to, shard=shard)


def _warn_of_few_steps(outputs: Outputs, progress: Progress, noted: set[str]) -> None:
    """Names the shortest branch, once in a run, if it is far from converged."""
    steps, name = shortest_branch(outputs.plan, outputs.config, outputs.split_manifest)
    text = (
        f"train: the shortest branch, {name}, takes {steps} steps; "
        f"below about {FEW_STEPS} a branch is far from converged"
    )
    if steps < FEW_STEPS and text not in noted:
        noted.add(text)
        progress.note(text)


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
    if move.source == move.target:
        records.remove(name)  # it has the old branch.json; the stage.json of the copy has the new
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
