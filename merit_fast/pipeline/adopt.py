"""Finished branches whose content a run still needs, under names that it gives to others."""

from dataclasses import replace
from pathlib import Path

from merit_fast.manifests.directories import is_complete, recover_directory
from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.relocate import finished_outputs, move_outputs
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.manifests.stages import TRAIN
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress

_BRANCH_FILE = "branch.json"


def adopt_branches(outputs: Outputs, progress: Progress) -> None:
    """Renames finished branches of the planned contents to their planned names.

    So a split whose groups change their numbers, or another arm of the same group, trains nothing.
    A finished branch in the way goes to the folder ``old``.
    """
    folder = outputs.folder(TRAIN)
    finished = finished_outputs(folder, TRAIN.name)
    moves = {}
    for branch in outputs.plan.trained:
        path = outputs.branch_path(branch.name)
        fingerprint = outputs.branch(branch).fingerprint
        recover_directory(path, fingerprint)
        source = finished.get(fingerprint)
        if source is not None and source != path and not is_complete(path, fingerprint):
            moves[source] = path
            progress.note(
                f"{TRAIN.folder}/{branch.name}: {TRAIN.folder}/{source.name} has the same rows, "
                "start and recipe; it is renamed"
            )
    if moves:
        move_outputs(moves, outputs.root / "old" / TRAIN.folder)


def relabel(path: Path, branch: Branch) -> None:
    """Writes the names of ``branch`` and its datasets into branch.json, where others stand."""
    file = path / _BRANCH_FILE
    manifest = read_manifest(BranchManifest, file)
    named = replace(
        manifest,
        branch=branch.name,
        arm=branch.arm,
        group=branch.group,
        datasets=branch.datasets,
    )
    if named != manifest:
        write_manifest(named, file)
