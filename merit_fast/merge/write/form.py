"""The form of an output: safetensors, or a distributed checkpoint, whose code loads only then."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.merge.config import MergeConfig
from merit_fast.merge.engine.layout import OutputFile
from merit_fast.merge.engine.plan import Plan
from merit_fast.merge.engine.prepare import Inputs
from merit_fast.merge.read.remote import Location
from merit_fast.merge.write.shards import ShardWriter, Share, finish_output

if TYPE_CHECKING:
    from merit_fast.merge.write.distcp.layout import DistributedLayout


def layout_of(inputs: Inputs, config: MergeConfig) -> "DistributedLayout | None":
    """Shards and chunks of a distributed checkpoint; None for safetensors."""
    if config.form != "distcp":
        return None
    from merit_fast.merge.write.distcp.layout import distributed_layout

    return distributed_layout(inputs.checkpoints[0], inputs.files)


def file_sizes(files: Sequence[OutputFile], layout: "DistributedLayout | None") -> dict[str, int]:
    """Weight file of an output -> bytes; with a layout those of the distributed checkpoint."""
    if layout is not None:
        return {file.name: file.num_bytes for file in layout.files}
    return {file.name: file.num_bytes for file in files}


def plan_of_form(plan: Plan, layout: "DistributedLayout | None", directory: Path | None) -> Plan:
    """The plan of whole tensors, or that of the shards of a distributed checkpoint."""
    if layout is None or directory is None:
        return plan
    from merit_fast.merge.write.distcp.plan import distributed_plan

    return distributed_plan(plan, layout, directory)


def write_before(plan: Plan, writer: ShardWriter, share: Share = (1, 1)) -> None:
    """Writes the whole tensors from which shards are cut, if the plan has some."""
    if plan.before is not None:
        from merit_fast.merge.write.distcp.whole import write_whole_tensors

        write_whole_tensors(plan, writer, share)


def finish_form(
    plan: Plan,
    layout: "DistributedLayout | None",
    inputs: Inputs,
    models: Sequence[Location],
    config: MergeConfig,
    directory: Path,
    weights_at: Location | None,
) -> None:
    """Adds every file that holds no weights; arguments as in ``finish_output``."""
    if layout is None:
        finish_output(plan, inputs, models, config, directory, weights_at)
        return
    from merit_fast.merge.write.distcp.finish import finish_distributed

    finish_distributed(layout, inputs, directory)
