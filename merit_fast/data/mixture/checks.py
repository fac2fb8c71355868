"""Checks the entries of a mixture against each other and against the files they name."""

from collections import Counter
from collections.abc import Sequence

from merit_fast.data.config import DatasetConfig
from merit_fast.data.sources import Source, local_files
from merit_fast.errors import InputError


def check_mixture(configs: Sequence[DatasetConfig]) -> None:
    """Checks the rules within and across entries that need no row.

    Raises:
        InputError: two entries share a name, path and eval_path share a file, or local files have
            a split.
    """
    for name, count in Counter(config.name for config in configs).items():
        if count > 1:
            raise InputError(
                f"mixture: name: must differ between datasets, got {name!r} {count} times"
            )
    for config in configs:
        files = local_files(Source(config.path))
        held_out = local_files(Source(config.eval_path)) if config.eval_path else None
        eval_is_local = files is not None if config.eval_path is None else held_out is not None
        if config.eval_split is not None and eval_is_local:
            raise _misplaced_split(config, "eval_split", config.eval_split)
        split_is_used = files is None or (config.eval_split is None and not eval_is_local)
        if config.split != "train" and not split_is_used:
            raise _misplaced_split(config, "split", config.split)
        shared = {file.resolve() for file in files or ()} & {
            file.resolve() for file in held_out or ()
        }
        if shared:
            raise InputError(
                f"mixture: {config.name}: eval_path: must hold other files than path, "
                f"got {min(shared)} in both"
            )


def _misplaced_split(config: DatasetConfig, key: str, value: str) -> InputError:
    rule = "must be absent for local files; splits belong to Hugging Face datasets"
    return InputError(f"mixture: {config.name}: {key}: {rule}, got {value!r}")
