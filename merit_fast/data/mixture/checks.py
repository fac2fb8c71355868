"""Checks the entries of a mixture against each other and against the files they name."""

from collections import Counter
from collections.abc import Sequence

from merit_fast.data.config import DatasetConfig, source
from merit_fast.data.sources import is_sliced, local_files
from merit_fast.errors import InputError


def check_mixture(configs: Sequence[DatasetConfig]) -> None:
    """Checks the rules within and across entries that need no row.

    Raises:
        InputError: two entries share a name, training and held-out rows share a file, or there is
            no such file or split.
    """
    for name, count in Counter(config.name for config in configs).items():
        if count > 1:
            raise InputError(
                f"mixture: name: must differ between datasets, got {name!r} {count} times"
            )
    for config in configs:
        _check_parts(config)


def check_held_out(configs: Sequence[DatasetConfig]) -> None:
    """Checks that a run has rows to measure its models on; reads no row.

    Raises:
        InputError: no dataset has held-out rows.
    """
    if all(source(config, "eval") is None for config in configs):
        raise InputError(
            "evaluate: no dataset of the mixture has held-out rows; give one an eval_path or "
            "eval_split, or eval_share: 0.05, which holds out a share of its rows"
        )


def _check_parts(config: DatasetConfig) -> None:
    """Checks that files and splits are there, and that the parts are of different files."""
    training = source(config, "train")
    held_out = source(config, "eval")
    assert training is not None
    files = local_files(training)
    if held_out is None or held_out == training:
        return
    others = local_files(held_out)
    if is_sliced(training.split) and is_sliced(held_out.split):
        return  # parts of one file; a row on both sides is a leak
    shared = {file.resolve() for file in files or ()} & {file.resolve() for file in others or ()}
    if shared:
        key = "eval_path" if config.eval_path else "eval_split"
        raise InputError(
            f"mixture: {config.name}: {key}: must hold other files than path, "
            f"got {min(shared)} in both"
        )
