"""The stages, branches and merges of a run that are not up to date."""

from collections.abc import Callable, Collection
from pathlib import Path

from merit_fast.errors import MeritFastError
from merit_fast.manifests.io import StageManifest
from merit_fast.manifests.stages import (
    EVALUATE,
    MERGE,
    REPORT,
    SKETCH,
    SPLIT,
    TRAIN,
    Stage,
)
from merit_fast.pipeline.arms import WARMUP, Branch
from merit_fast.pipeline.outputs import Outputs


def pending_stages(outputs: Outputs, stages: Collection[Stage]) -> tuple[Stage, ...]:
    """Those of ``stages`` that have work to do.

    Raises:
        InputError: the base or a file of training rows cannot be read.
    """
    _ = outputs.base_fingerprint, outputs.train_fingerprint
    return tuple(stage for stage in stages if not _is_finished(outputs, stage))


def warmup_is_pending(outputs: Outputs) -> bool:
    """Whether the run has a warm-up that is not trained yet."""
    path = outputs.folder(TRAIN) / WARMUP
    is_wanted = bool(outputs.config.split.warmup)
    return is_wanted and not is_current(outputs, path, lambda: outputs.branch(outputs.warmup))


def pending_branches(outputs: Outputs) -> tuple[Branch, ...] | None:
    """The planned branches that are to be trained; None while the split is not up to date."""
    if not _is_finished(outputs, SPLIT):
        return None
    return tuple(branch for branch in outputs.plan.trained if not _is_trained(outputs, branch))


def pending_merges(outputs: Outputs) -> tuple[str, ...] | None:
    """The planned merges that are to be made; None while the split is not up to date."""
    if not _is_finished(outputs, SPLIT):
        return None
    return tuple(name for name in outputs.plan.merges if not _is_merged(outputs, name))


def is_current(outputs: Outputs, path: Path, manifest: Callable[[], StageManifest]) -> bool:
    """Whether ``path`` holds the finished output of this stage, config and inputs."""
    try:
        return outputs.is_finished(path, manifest())
    except MeritFastError:  # the split, from which the manifest comes, is not up to date
        return False


def _is_finished(outputs: Outputs, stage: Stage) -> bool:
    folder = outputs.folder(stage)
    if stage == SKETCH:
        is_done = is_current(outputs, folder, lambda: outputs.sketch)
        return is_done and not warmup_is_pending(outputs)
    if stage == TRAIN:
        return pending_branches(outputs) == ()
    if stage == MERGE:
        return pending_merges(outputs) == ()
    manifests: dict[str, Callable[[], StageManifest]] = {
        SPLIT.name: lambda: outputs.split,
        EVALUATE.name: lambda: outputs.evaluate,
        REPORT.name: lambda: outputs.report,
    }
    return is_current(outputs, folder, manifests[stage.name])


def _is_trained(outputs: Outputs, branch: Branch) -> bool:
    path = outputs.branch_path(branch.name)
    return is_current(outputs, path, lambda: outputs.branch(branch))


def _is_merged(outputs: Outputs, name: str) -> bool:
    return is_current(outputs, outputs.merge_path(name), lambda: outputs.merge(name))
