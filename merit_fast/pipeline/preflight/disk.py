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
from merit_fast.sketch.config import SketchConfig
from merit_fast.train.config import TrainConfig
from merit_fast.units import human_bytes

_ROW_BYTES = 52  # of a stored row, next to its vector in float16
# of a trained parameter in a checkpoint to resume from: its master and two moments
_STATE_BYTES = {"adamw": 12, "adamw-8bit": 6}


@dataclass(frozen=True)
class Disk:
    """Bytes still to be written, by kind."""

    branches: int = 0
    checkpoint: int = 0  # of the branch in training; the next one is written before it goes
    merges: int = 0
    rows: int = 0  # stored by the sketch
    spans: int = 0  # sums, and rows once more, of the dataset with the most spans

    @property
    def total(self) -> int:
        return self.branches + self.checkpoint + self.merges + self.rows + self.spans


def disk_of(outputs: Outputs, data: RunData, pending: Sequence[Stage]) -> Disk:
    """The bytes of the models and stored rows that these stages still make."""
    rows = _stored_bytes(outputs, data) if SKETCH in pending else 0
    spans = _span_bytes(outputs, data) if SKETCH in pending else 0
    makes_branches = TRAIN in pending or (SKETCH in pending and warmup_is_pending(outputs))
    if not (makes_branches or MERGE in pending):
        return Disk(rows=rows, spans=spans)
    config = outputs.config
    parameters = num_parameters(outputs.base)
    warmup = Load()
    load = Load()
    if SKETCH in pending and warmup_is_pending(outputs):
        warmup = warmup_load(outputs, data)
    if TRAIN in pending:
        load = train_load(outputs, data)
    whole = parameters * _item_bytes(config.train.dtype)
    trained = num_trained_parameters(outputs.base, config.train) if makes_branches else 0
    each = 4 * trained if config.train.adapter.is_saved_apart else whole
    merged = config.merge.dtype or config.train.dtype
    return Disk(
        branches=warmup.models * whole + load.models * each,
        checkpoint=2 * trained * _checkpoint_bytes(config.train, (warmup + load).longest),
        merges=merges_of(outputs) * parameters * _item_bytes(merged) * (MERGE in pending),
        rows=rows,
        spans=spans,
    )


def _stored_bytes(outputs: Outputs, data: RunData) -> int:
    split = outputs.config.split
    if not split.store:
        return 0
    return _row_bytes(split) * sketch_load(outputs.config, data.sketched).rows


def _span_bytes(outputs: Outputs, data: RunData) -> int:
    """Bytes of spans, which are there until their dataset is finished."""
    config = outputs.config.split.sketch_config()
    most = max(config.num_spans(dataset.num_examples) for dataset in data.sketched)
    if most == 1:
        return 0
    sums = 8 * (config.blocks + 1) * config.proj_dim * (1 + len(config.parts or {}))
    rows = config.span * _row_bytes(config) * config.store
    return most * (sums + rows)


def _row_bytes(config: SketchConfig) -> int:
    """Bytes of a stored row."""
    return _ROW_BYTES + 2 * config.store_dim


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
            "spans of sketches": disk.spans,
        }
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in kinds.items() if size)
        raise InputError(
            f"output: {outputs.root} must have {human_bytes(disk.total)} free ({parts}), "
            f"the disk has {human_bytes(free)}"
        )


def _checkpoint_bytes(train: TrainConfig, longest: int) -> int:
    """Bytes for each trained parameter: the state of the optimizer, and the best weights."""
    state = _STATE_BYTES[train.optimizer] * (longest > train.checkpoint_steps)
    best = 4 if train.adapter.is_on else _item_bytes(train.dtype)
    return state + best * (train.patience is not None)


def _item_bytes(dtype: str) -> int:
    return ITEM_BYTES[SHORT_NAMES[dtype]]
