"""The forecast of a run, stage by stage: `merit-fast run CONFIG.yml --dry-run`."""

from collections.abc import Sequence
from dataclasses import dataclass

from merit_fast.manifests.stages import (
    EVALUATE,
    MERGE,
    SKETCH,
    SPLIT,
    STAGES,
    TRAIN,
    Stage,
)
from merit_fast.merge.write.shards import free_bytes
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.preflight.base import num_parameters, num_trained_parameters
from merit_fast.pipeline.preflight.disk import Disk, disk_of
from merit_fast.pipeline.preflight.load import (
    Load,
    count_tokens,
    measured_models,
    merges_of,
    num_groups,
    sketch_load,
    train_load,
    warmup_load,
)
from merit_fast.pipeline.preflight.memory import describe_memory
from merit_fast.pipeline.preflight.pending import pending_stages, warmup_is_pending
from merit_fast.pipeline.preflight.rates import Rate, rate_of
from merit_fast.units import human_bytes, human_count, human_time

_KFAC_PASSES = 3  # collecting takes about 1.4 plain passes, sketching with the factors 1.8
_MERGE_BYTES_S = 200e6  # output bytes a second, a slow disk
_RETENTION_TOKENS = 2300  # of the general text and the prompts with their answers
_PROMPTS = 16
_GENERATION = 3  # a generated token takes this many times one that is only read
_COLUMNS = ("stage", "models", "rows", "tokens", "steps", "disk", "time")


@dataclass(frozen=True)
class StageForecast:
    """The work that a stage has still to do; all zero if it is up to date."""

    stage: str
    up_to_date: bool
    models: int = 0  # trained, merged or measured
    rows: int = 0
    tokens: int = 0
    steps: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """The work of a run. ``groups``: K, or the largest that is tried where it is automatic."""

    output: str
    groups: int
    stages: tuple[StageForecast, ...]
    seconds: float
    rate: str  # where the seconds come from
    needed_bytes: int
    free_bytes: int
    notes: tuple[str, ...]


def forecast_run(outputs: Outputs, data: RunData) -> Forecast:
    """The forecast of all stages. Reads rows and headers, may multiply matrices for a second.

    Raises:
        InputError: a row or a header of the base is broken.
    """
    pending = pending_stages(outputs, STAGES)
    stages: list[StageForecast] = []
    disk = Disk()
    source = "nothing is left to do"
    if pending:
        disk = disk_of(outputs, data, pending)
        trained = num_trained_parameters(outputs.base, outputs.config.train)
        rate = rate_of(outputs, num_parameters(outputs.base), trained)
        source = rate.source
        stages = _stage_forecasts(outputs, data, pending, disk, rate)
    else:
        stages = [StageForecast(stage.name, True) for stage in STAGES]
    return Forecast(
        output=str(outputs.root),
        groups=num_groups(outputs, data),
        stages=tuple(stages),
        seconds=round(sum(stage.seconds for stage in stages), 1),
        rate=source,
        needed_bytes=disk.total,
        free_bytes=free_bytes(outputs.root.absolute()),
        notes=tuple(_notes(outputs, pending, disk)),
    )


def describe_forecast(forecast: Forecast) -> str:
    """The forecast as a table for people."""
    rows = [_COLUMNS, *[_row(stage) for stage in forecast.stages]]
    widths = [max(len(row[i]) for row in rows if len(row) > 2 or i == 0) for i in range(7)]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([first, row[1]] if len(row) == 2 else [first, *others]))
    return "\n".join(
        [
            *lines,
            f"{forecast.output}: about {human_time(forecast.seconds)} ({forecast.rate})",
            f"disk: {human_bytes(forecast.needed_bytes)} needed, "
            f"{human_bytes(forecast.free_bytes)} free",
            *forecast.notes,
        ]
    )


def _stage_forecasts(
    outputs: Outputs, data: RunData, pending: Sequence[Stage], disk: Disk, rate: Rate
) -> list[StageForecast]:
    forecasts = []
    if SKETCH in pending and warmup_is_pending(outputs):
        load = warmup_load(outputs, data)
        forecasts.append(_of_load(WARMUP, load, load.tokens * rate.train_s))
    for stage in STAGES:
        if stage not in pending:
            forecasts.append(StageForecast(stage.name, True))
        elif stage == SKETCH:
            load = sketch_load(outputs.config, data.branch)
            passes = _KFAC_PASSES if outputs.config.split.normalize == "kfac" else 1
            seconds = passes * load.tokens * rate.sketch_s
            forecasts.append(_of_load(stage.name, load, seconds, disk.rows))
        elif stage == TRAIN:
            load = train_load(outputs, data)
            forecasts.append(_of_load(stage.name, load, load.tokens * rate.train_s, disk.branches))
        elif stage == MERGE:
            load = Load(merges_of(outputs))
            forecasts.append(_of_load(stage.name, load, disk.merges / _MERGE_BYTES_S, disk.merges))
        elif stage == EVALUATE:
            forecasts.append(_evaluation(outputs, data, rate))
        else:
            forecasts.append(_of_load(stage.name, Load(), 1.0))
    return forecasts


def _of_load(name: str, load: Load, seconds: float, num_bytes: int = 0) -> StageForecast:
    counts = (load.models, load.rows, load.tokens, load.steps)
    return StageForecast(name, False, *counts, num_bytes, round(seconds, 1))


def _evaluation(outputs: Outputs, data: RunData, rate: Rate) -> StageForecast:
    models = measured_models(outputs, data)
    rows = data.reporting
    generated = _PROMPTS * outputs.config.evaluate.max_new_tokens
    read = count_tokens(rows) + _RETENTION_TOKENS
    load = Load(
        models,
        models * sum(dataset.num_examples for dataset in rows),
        models * (read + generated),
    )
    seconds = models * (read + _GENERATION * generated) * rate.forward_s
    return _of_load(EVALUATE.name, load, seconds)


def _row(stage: StageForecast) -> tuple[str, ...]:
    if stage.up_to_date:
        return stage.stage, "up to date"
    counts = [stage.models, stage.rows, stage.tokens, stage.steps]
    cells = [human_count(count) if count else "" for count in counts]
    size = human_bytes(stage.bytes) if stage.bytes else ""
    return stage.stage, *cells, size, human_time(stage.seconds)


def _notes(outputs: Outputs, pending: Sequence[Stage], disk: Disk) -> list[str]:
    config = outputs.config
    notes = []
    if TRAIN in pending and config.train.engine == "builtin":
        notes.append(describe_memory(outputs.base, config.train))
    if TRAIN in pending and SPLIT in pending:
        notes.append("the split is not made yet: at most so many branches, equal ones are one")
    if config.split.groups == "auto" and SPLIT in pending:
        notes.append("split.groups is auto: the forecast assumes the largest K that is tried")
    if config.merge.is_tuned and MERGE in pending:
        notes.append("the search of scale or weights takes time that is not in the forecast")
    if config.evaluate.audit and EVALUATE in pending:
        notes.append("the audit takes time that is not in the forecast")
    if disk.checkpoint:
        notes.append(f"{human_bytes(disk.checkpoint)} of the disk are for checkpoints in training")
    return notes
