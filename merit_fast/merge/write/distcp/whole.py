"""Whole tensors that are written first, where a method looks at more than one chunk."""

from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.plan import Plan
from merit_fast.merge.write.distcp.plan import WHOLE_FOLDER
from merit_fast.merge.write.shards import Share, write_shards
from merit_fast.progress import Progress


def write_whole_tensors(
    plan: Plan, config: MergeConfig, directory: Path, progress: Progress, share: Share = (1, 1)
) -> None:
    """Writes the files of ``plan.before``, if it has one, into a folder of ``directory``.

    Raises:
        InputError: several processes share the merge.
    """
    if plan.before is None:
        return
    if share != (1, 1):
        rule = f"form distcp and method {config.method} take one process"
        raise InputError(f"merge: share: must be 1/1: {rule}, got {share[0]}/{share[1]}")
    (directory / WHOLE_FOLDER).mkdir(exist_ok=True)
    write_shards(plan.before, config, directory / WHOLE_FOLDER, progress)
