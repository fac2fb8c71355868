"""The checks of a run before its first heavy step; every error names key, rule and value."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from merit_fast.data.mixture.checks import check_held_out
from merit_fast.errors import InputError
from merit_fast.manifests.stages import EVALUATE, MERGE, SKETCH, SPLIT, TRAIN, Stage
from merit_fast.merge import prepare_merge, resolve_weights
from merit_fast.merge.combine.combination import combine
from merit_fast.merge.option_names import options_named
from merit_fast.model import settle_dtype
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.preflight.base import (
    check_architecture,
    check_kernels,
    check_memory,
    check_packing,
    check_parts,
)
from merit_fast.pipeline.preflight.disk import check_disk
from merit_fast.pipeline.preflight.pending import pending_branches, pending_stages
from merit_fast.pipeline.preflight.training import (
    check_division,
    check_training,
    check_watched,
    is_divided,
)
from merit_fast.split.search.partition import partition_datasets


def check_stages(outputs: Outputs, data: RunData, stages: Sequence[Stage]) -> None:
    """Checks all that these stages need and that config, headers and rows tell.

    Stages that are up to date are not checked. Nothing but tokenized rows is written.

    Raises:
        InputError: a rule is broken that a later step would meet.
    """
    config = outputs.config
    _check_writable(outputs.root)
    pending = pending_stages(outputs, stages)
    if SPLIT in pending:
        _check_split(config)
    if MERGE in pending:
        _check_merge(outputs)
    runs_models = [stage for stage in (SKETCH, TRAIN, EVALUATE) if stage in pending]
    if runs_models:
        check_architecture(outputs.base)
        check_kernels(pending)
    if SKETCH in pending:
        check_memory(outputs.base, config.split)
        check_parts(outputs.base, config.split, config.train.freeze)
    if TRAIN in pending:
        check_training(outputs.base, config.train)
        if is_divided(config.train):
            check_division(outputs.base, config.train)
    _check_rows(data, pending)
    if TRAIN in pending and pending_branches(outputs) != ():
        _check_training(outputs, data)
    if outputs.store is None:  # with one, units on any machine check their own disks
        check_disk(outputs, data, pending)


def _check_training(outputs: Outputs, data: RunData) -> None:
    """Checks what the trainer of the branches needs: another stack, or packed rows of our own."""
    config = outputs.config
    if config.train.engine != "builtin":
        from merit_fast.engines.check import check_engine

        check_engine(outputs, data)
    elif config.train.packing and not is_divided(config.train):
        check_packing(outputs.base, config, data.branch)


def _check_writable(root: Path) -> None:
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"output: must be writable, {folder} is not, got {root}")


def _check_split(config: RunConfig) -> None:
    """Splits datasets that are all alike, so that the split stage's own rules speak."""
    split = config.split
    names = [dataset.name for dataset in config.mixture]
    if split.groups == "auto":
        _check_names(config)
        return
    alike = np.eye(len(names))
    try:
        partition_datasets(
            alike,
            np.full(len(names), 1 / len(names)),
            names,
            split.groups,
            split.filled().method,
            tolerance=split.tolerance,
            pins=split.pins,
            spread=split.spread,
            manual=split.manual or None,
            uncentered=alike,
            text_similarity=alike,
        )
    except InputError as error:
        raise InputError(f"split.{error}") from None


def _check_names(config: RunConfig) -> None:
    split = config.split
    known = [dataset.name for dataset in config.mixture]
    listed = [("pins.together", names) for names in split.pins.together]
    listed += [("pins.apart", names) for names in split.pins.apart]
    listed += [("pins.group", tuple(split.pins.group)), ("spread", split.spread)]
    for key, names in listed:
        for name in names:
            if name not in known:
                raise InputError(f"split.{key}: must be a dataset of the mixture, got {name!r}")


@options_named("yaml")
def _check_merge(outputs: Outputs) -> None:
    """Prepares a merge of K copies of the base: its headers stand for the branches' headers."""
    config = outputs.config
    groups = config.split.groups
    if groups == "auto":
        return
    merge = config.merge
    weights = (1 / groups,) * groups
    if merge.is_tuned:
        merge = merge.filled(weights, 1.0 if merge.scale == "auto" else None)
    models = [outputs.root / f"branch-{group}" for group in range(groups)]
    if isinstance(merge.weights, tuple):
        resolve_weights(models, merge)
    merge = replace(merge, dtype=merge.dtype or settle_dtype(config.train.dtype))
    combine(models, weights, outputs.base, merge)
    if not config.split.warmup:  # with one, its result is the base of the merge
        prepare_merge([outputs.base] * groups, weights, outputs.base, merge)


def _check_rows(data: RunData, pending: Sequence[Stage]) -> None:
    """Tokenizes every row that the stages will use; they stay with ``data`` for them."""
    is_tuned = data.config.merge.is_tuned
    watches = TRAIN in pending and data.config.train.evaluate_steps is not None
    if SKETCH in pending or TRAIN in pending:
        data.rows.select("train")  # a wrong row ends the run before any row is tokenized
    if EVALUATE in pending and not is_tuned:
        check_held_out(data.config.mixture)
    if EVALUATE in pending or (MERGE in pending and is_tuned) or watches:
        _ = data.held_out
    if watches:
        check_watched(data.config, data.watched)
    if SKETCH in pending or TRAIN in pending:
        needs_all = SPLIT in pending or TRAIN in pending
        datasets = data.branch if needs_all else data.sketched
        short = [dataset.name for dataset in datasets if dataset.num_examples < 2]
        if SKETCH in pending and short:
            raise InputError(
                f"mixture: {short[0]}: split needs at least 2 examples per dataset, got 1"
            )
