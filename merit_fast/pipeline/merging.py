"""The work on the merged arms of a run: tuning, merging, listing for evaluation, auditing."""

from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import TUNE_FILE, AuditManifest, TuneManifest
from merit_fast.manifests.stages import AUDIT
from merit_fast.merge import RunFacts, merge_branches, resolve_weights
from merit_fast.pipeline.arms import merged_arms
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress
from merit_fast.report import audit_sentence

if TYPE_CHECKING:
    from merit_fast.evaluate.stage import MergedArm


def merge_arm(
    arm: str, directory: Path, outputs: Outputs, data: RunData, progress: Progress
) -> None:
    """Merges the branches of one arm into ``directory``.

    Raises:
        MeritFastError: a branch is absent or was made from another config.
    """
    for name in outputs.branches_of(arm):
        outputs.require(outputs.branch_path(name), outputs.branch(outputs.branches[name]))
    paths = outputs.branch_paths(arm)
    config = outputs.config.merge
    if config.is_tuned:
        tuned = _tune_arm(arm, directory, outputs, data, progress)
        config = config.filled(tuned.weights, tuned.scale)
    weights = resolve_weights(paths, config)
    facts = RunFacts(outputs.config.model, outputs.split_manifest, arm, is_stage=True)
    merge_branches(paths, weights, outputs.start, directory, config, progress, facts)


def _tune_arm(
    arm: str, directory: Path, outputs: Outputs, data: RunData, progress: Progress
) -> TuneManifest:
    from merit_fast.evaluate.audit import audit_rows
    from merit_fast.tune.search import TuneInputs, starting_weights, tune_merge, tuning_sentence

    config = outputs.config.merge
    paths = outputs.branch_paths(arm)
    names = tuple(outputs.branches_of(arm))
    inputs = TuneInputs(paths, names, starting_weights(paths, config), outputs.start)
    rows = audit_rows(data.tuning, config.tune_rows)
    batch_size = outputs.config.evaluate.batch_size
    tuned = tune_merge(inputs, rows, data.pad_token_id, batch_size, config, directory, progress)
    progress.note(f"{arm}: {tuning_sentence(tuned)}")
    return tuned


def finished_merges(outputs: Outputs) -> "dict[str, MergedArm]":
    """Every merged arm with its folder, its branches and the weights of its merge.

    Raises:
        MeritFastError: a merge is absent or was made from another config.
    """
    from merit_fast.evaluate.stage import MergedArm

    config = outputs.config.merge
    merges = {}
    for arm in merged_arms(outputs.config):
        path = outputs.merge_path(arm)
        outputs.require(path, outputs.merge(arm))
        if config.is_tuned:
            weights = read_manifest(TuneManifest, path / TUNE_FILE).weights
        else:
            weights = tuple(resolve_weights(outputs.branch_paths(arm), config))
        merges[arm] = MergedArm(path, tuple(outputs.branches_of(arm)), weights)
    return merges


def audit_arms(directory: Path, outputs: Outputs, data: RunData, progress: Progress) -> None:
    """Writes audit.json into ``directory`` and notes one sentence for each arm."""
    from merit_fast.evaluate.audit import audit_merges

    audits = audit_merges(
        finished_merges(outputs),
        {name: outputs.branch_path(name) for name in outputs.branches},
        outputs.start,
        data.reporting,
        data.pad_token_id,
        outputs.config.evaluate,
        progress,
    )
    write_manifest(AuditManifest(audits), directory / AUDIT.file)
    for arm, audit in audits.items():
        progress.note(f"audit {arm}: {audit_sentence(audit)}")
