"""The recipe of the branches before a model is loaded: packages, modules, rows."""

from collections.abc import Sequence
from pathlib import Path

from merit_fast.data import Dataset
from merit_fast.errors import InputError
from merit_fast.pipeline.config import RunConfig
from merit_fast.train.config import TrainConfig
from merit_fast.train.parallel.world import world_size


def check_training(base: Path, train: TrainConfig) -> None:
    """Checks that the recipe fits the base, on a model without weights where it must be asked.

    Raises:
        InputError: see ``check_trackers``, ``check_adapter`` and ``check_checkpointing``.
    """
    from merit_fast.model import make_empty_model
    from merit_fast.train.adapter.build import check_adapter
    from merit_fast.train.loss import router_coefficient
    from merit_fast.train.metrics.trackers import check_trackers
    from merit_fast.train.prepare import check_checkpointing

    check_trackers(train.report_to)
    if train.adapter.is_on:
        check_adapter(base, train.adapter, train.freeze)
    model = make_empty_model(str(base))
    router_coefficient(model)
    if train.gradient_checkpointing:
        check_checkpointing(model)


def is_divided(train: TrainConfig) -> bool:
    """Whether several processes divide the model of a branch."""
    return train.shard == "full" and world_size() > 1


def check_division(base: Path, train: TrainConfig) -> None:
    """Checks that processes can divide the base and read their rows of it.

    Raises:
        InputError: see ``make_hollow_model``.
    """
    from merit_fast.train.parallel.load import make_hollow_model

    make_hollow_model(str(base), train.dtype)


def check_watched(config: RunConfig, watched: Sequence[Dataset]) -> None:
    """Checks that every dataset has held-out rows for ``train.evaluate_steps``.

    Raises:
        InputError: one has none.
    """
    names = {dataset.name for dataset in watched if dataset.num_target_tokens}
    for dataset in config.mixture:
        if dataset.name not in names:
            raise InputError(
                "train.evaluate_steps: needs held-out rows of every dataset, "
                f"{dataset.name} has none; give it an eval_path or eval_split"
            )
