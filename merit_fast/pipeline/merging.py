"""The work on the merged arms of a run: tuning, merging, listing for evaluation, auditing."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.manifests.io import read_manifest, write_manifest
from merit_fast.manifests.schemas import TUNE_FILE, AuditManifest, TuneManifest
from merit_fast.manifests.stages import AUDIT
from merit_fast.merge import RunFacts, merge_branches, prepare_merge, resolve_weights
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress
from merit_fast.report import audit_sentence

if TYPE_CHECKING:
    from merit_fast.evaluate.stage import EvaluatedModels, MergedArm


def merge_model(
    name: str, directory: Path, outputs: Outputs, data: RunData, progress: Progress
) -> None:
    """Merges the branches of one arm and seed into ``directory``.

    Args:
        name: the merge: ``merit``, or ``merit.seed1`` for the second seed.
        directory: where the merge goes.
        outputs: paths of the run.
        data: rows of the run.
        progress: display of the run.

    Raises:
        MeritFastError: a branch is absent or was made from another config.
    """
    paths = _finished_branches(name, outputs)
    config = outputs.config.merge
    if config.is_tuned:
        tuned = _tune_merge(name, directory, outputs, data, progress)
        config = config.filled(tuned.weights, tuned.scale)
    weights = resolve_weights(paths, config)
    facts = RunFacts(
        outputs.config.model, outputs.split_manifest, name.partition(".")[0], is_stage=True
    )
    merge_branches(
        paths, weights, outputs.start, directory, config, progress, facts, keep_records=True
    )


def merge_share(
    name: str, directory: Path, outputs: Outputs, progress: Progress, share: tuple[int, int]
) -> None:
    """Writes a share (i, n) of the weight files of a merge that is not tuned.

    Raises:
        MeritFastError: a branch is absent or was made from another config.
    """
    paths = _finished_branches(name, outputs)
    config = outputs.config.merge
    weights = resolve_weights(paths, config)
    merge = prepare_merge(paths, weights, outputs.start, config)
    merge.write_files(directory, progress, share)


def _finished_branches(name: str, outputs: Outputs) -> list[Path]:
    """Directories of a merge's branches.

    Raises:
        MeritFastError: a branch is absent or was made from another config.
    """
    for branch in outputs.plan.merges[name]:
        outputs.require(outputs.branch_path(branch), outputs.branch(outputs.branches[branch]))
    return outputs.merge_inputs(name)


def _tune_merge(
    name: str, directory: Path, outputs: Outputs, data: RunData, progress: Progress
) -> TuneManifest:
    from merit_fast.evaluate.audit import audit_rows
    from merit_fast.tune.search import TuneInputs, starting_weights, tune_merge, tuning_sentence

    config = outputs.config.merge
    paths = outputs.merge_inputs(name)
    branches = outputs.plan.merges[name]
    inputs = TuneInputs(paths, branches, starting_weights(paths, config), outputs.start)
    rows = audit_rows(data.tuning, config.tune_rows)
    batch_size = outputs.config.evaluate.batch_size
    tuned = tune_merge(inputs, rows, data.pad_token_id, batch_size, config, directory, progress)
    progress.note(f"{name}: {tuning_sentence(tuned)}")
    return tuned


def finished_merges(outputs: Outputs, names: Iterable[str]) -> "dict[str, MergedArm]":
    """Each of these merges with its folder, its branches and the weights of its merge.

    Raises:
        MeritFastError: a merge is absent or was made from another config.
    """
    from merit_fast.evaluate.stage import MergedArm

    config = outputs.config.merge
    merges = {}
    for name in names:
        path = outputs.merge_path(name)
        outputs.require(path, outputs.merge(name))
        if config.is_tuned:
            weights = read_manifest(TuneManifest, path / TUNE_FILE).weights
        else:
            weights = tuple(resolve_weights(outputs.merge_inputs(name), config))
        branches = tuple(outputs.plan.owners[branch] for branch in outputs.plan.merges[name])
        merges[name] = MergedArm(path, branches, weights)
    return merges


def models_of(outputs: Outputs) -> "EvaluatedModels":
    """The run's models by name; none needs to be finished, and merges have no weights."""
    from merit_fast.evaluate.stage import EvaluatedModels, MergedArm

    plan = outputs.plan
    branches = {branch.name: outputs.branch_path(branch.name) for branch in plan.trained}
    merges = {
        name: MergedArm(outputs.merge_path(name), members, ())
        for name, members in plan.merges.items()
    }
    starts = {branch.name: outputs.start_of(branch)[0] for branch in plan.trained}
    return EvaluatedModels(outputs.base, branches, merges, plan.measured_arms, plan.joint, starts)


def evaluated_models(outputs: Outputs) -> "EvaluatedModels":
    """Every finished branch and merge of the run, and the arms that they make.

    Raises:
        MeritFastError: one is absent, damaged or was made from another config.
    """
    for branch in outputs.plan.trained:
        outputs.require(outputs.branch_path(branch.name), outputs.branch(branch))
    return replace(models_of(outputs), merges=finished_merges(outputs, outputs.plan.merges))


def audit_arms(directory: Path, outputs: Outputs, data: RunData, progress: Progress) -> None:
    """Writes audit.json into ``directory`` and notes one sentence for each arm's first merge."""
    from merit_fast.evaluate.audit import audit_merges

    audits = audit_merges(
        finished_merges(outputs, outputs.plan.first_merges),
        {branch.name: outputs.branch_path(branch.name) for branch in outputs.plan.trained},
        outputs.start,
        data.reporting,
        data.pad_token_id,
        outputs.config.evaluate,
        progress,
    )
    write_manifest(AuditManifest(audits), directory / AUDIT.file)
    for arm, audit in audits.items():
        progress.note(f"audit {arm}: {audit_sentence(audit)}")
