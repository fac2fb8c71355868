"""Whole tensors that are written first, where a method looks at more than one chunk."""

from merit_fast.errors import InputError
from merit_fast.merge.engine.plan import Plan
from merit_fast.merge.write.distcp.plan import WHOLE_FOLDER
from merit_fast.merge.write.shards import ShardWriter, Share
from merit_fast.records import replace


def write_whole_tensors(plan: Plan, writer: ShardWriter, share: Share = (1, 1)) -> None:
    """Writes the files of ``plan.before`` into a folder of the writer's directory.

    Raises:
        InputError: several processes share the merge.
    """
    assert plan.before is not None
    if share != (1, 1):
        rule = f"form distcp and method {writer.config.method} take one process"
        raise InputError(f"merge: share: must be 1/1: {rule}, got {share[0]}/{share[1]}")
    folder = writer.directory / WHOLE_FOLDER
    folder.mkdir(exist_ok=True)
    whole = replace(writer, directory=folder, written=set())
    whole.write(plan.before.shards)
    whole.prove(plan.before.shards)
