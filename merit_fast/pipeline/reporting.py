"""Options of the report page and of the audit, taken from a run's config."""

from dataclasses import dataclass
from pathlib import Path

from merit_fast.pipeline.config import RunConfig
from merit_fast.train.config import TrainConfig


@dataclass(frozen=True)
class ReportOptions:
    """Text of the report page that comes from the config, and whether the page has an audit."""

    title: str
    notes: tuple[str, ...]
    audit: bool


@dataclass(frozen=True)
class AuditOptions:
    """Keys of the ``evaluate:`` section that decide audit.json."""

    batch_size: int
    audit_rows: int
    audit_points: int


def report_options(config: RunConfig, title: str, plan_notes: tuple[str, ...]) -> ReportOptions:
    """Options of the run's report page; ``plan_notes`` tell which arms are absent."""
    split = config.split
    train = config.train
    notes = (
        f"model {Path(config.model).name}, {len(config.mixture)} datasets, K = {split.groups}",
        f"sketch: {split.examples} examples per dataset {sketch_position(config)}, "
        f"width {split.proj_dim}",
        f"training: {train.epochs} epoch(s), learning rate {train.learning_rate:g}, "
        f"batch {train.batch_size}, {train.dtype}",
        f"seeds: split {split.seed}, train {_train_seeds(train)}",
        *plan_notes,
    )
    return ReportOptions(title, notes, config.evaluate.audit)


def _train_seeds(train: TrainConfig) -> str:
    if train.seeds == 1:
        return f"{train.seed}; every arm was trained once"
    last = train.seed + train.seeds - 1
    return f"{train.seed} to {last}; every arm was trained {train.seeds} times"


def audit_options(config: RunConfig) -> AuditOptions:
    """Options of the run's audit."""
    evaluate = config.evaluate
    return AuditOptions(evaluate.batch_size, evaluate.audit_rows, evaluate.audit_points)


def sketch_position(config: RunConfig) -> str:
    """The model at which the gradients are sketched, in words."""
    share = config.split.warmup
    return f"after a joint warm-up on {share:.0%} of the rows" if share else "at the base model"
