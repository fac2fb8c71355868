"""The bytes that a run still writes, compared with the free bytes of its disk."""

from collections.abc import Sequence
from dataclasses import dataclass

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import ITEM_BYTES, SHORT_NAMES
from merit_fast.manifests.stages import MERGE, SKETCH, TRAIN, Stage
from merit_fast.merge.write.shards import free_bytes
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.preflight.base import num_parameters, num_trained_parameters
from merit_fast.pipeline.preflight.load import Load, merges_of, sketch_load, train_load, warmup_load
from merit_fast.pipeline.preflight.pending import warmup_is_pending
from merit_fast.train.config import TrainConfig
from merit_fast.units import human_bytes

_ROW_BYTES = 52  # of a stored row, next to its vector in float16
_STATE_BYTES = (
    12  # of a trained parameter in a checkpoint to resume from: fp32 master and two moments
)


@dataclass(frozen=True)
class Disk:
    """Bytes still to be written, by kind."""

    branches: int = 0
    checkpoint: int = 0  # of the branch in training; the next one is written before it goes
    merges: int = 0
    rows: int = 0  # stored by the sketch

    @property
    def total(self) -> int:
        return self.branches + self.checkpoint + self.merges + self.rows


def disk_of(outputs: Outputs, data: RunData, pending: Sequence[Stage]) -> Disk:
    """The bytes of the models and stored rows that these stages still make."""
    rows = _stored_bytes(outputs, data) if SKETCH in pending else 0
    makes_branches = TRAIN in pending or (SKETCH in pending and warmup_is_pending(outputs))
    if not (makes_branches or MERGE in pending):
        return Disk(rows=rows)
    config = outputs.config
    parameters = num_parameters(outputs.base)
    load = Load()
    if SKETCH in pending and warmup_is_pending(outputs):
        load += warmup_load(outputs, data)
    if TRAIN in pending:
        load += train_load(outputs, data)
    trained = num_trained_parameters(outputs.base, config.train) if makes_branches else 0
    checkpointed = load.longest > config.train.checkpoint_steps
    merged = config.merge.dtype or config.train.dtype
    return Disk(
        branches=load.models * _branch_bytes(config.train, parameters, trained),
        checkpoint=2 * _STATE_BYTES * trained * checkpointed,
        merges=merges_of(outputs) * parameters * _item_bytes(merged) * (MERGE in pending),
        rows=rows,
    )


def _stored_bytes(outputs: Outputs, data: RunData) -> int:
    split = outputs.config.split
    if not split.store:
        return 0
    each = _ROW_BYTES + 2 * split.store_dim
    return each * sketch_load(outputs.config, data.sketched).rows


def check_disk(outputs: Outputs, data: RunData, pending: Sequence[Stage]) -> None:
    """Checks that the disk holds what these stages write.

    Raises:
        InputError: it does not.
    """
    disk = disk_of(outputs, data, pending)
    free = free_bytes(outputs.root.absolute())
    if disk.total > free:
        kinds = {
            "branches": disk.branches,
            "merges": disk.merges,
            "checkpoints": disk.checkpoint,
            "stored rows": disk.rows,
        }
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in kinds.items() if size)
        raise InputError(
            f"output: {outputs.root} must have {human_bytes(disk.total)} free ({parts}), "
            f"the disk has {human_bytes(free)}"
        )


def _branch_bytes(train: TrainConfig, parameters: int, trained: int) -> int:
    """Bytes of a branch's weights: all of the base, or an adapter in float32."""
    if train.adapter.is_saved_apart:
        return 4 * trained
    return parameters * _item_bytes(train.dtype)


def _item_bytes(dtype: str) -> int:
    return ITEM_BYTES[SHORT_NAMES[dtype]]
