"""Names of axolotl's datasets on its tokenized rows, which axolotl itself drops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, MeritFastError

COLUMN = "merit_dataset"
_WRAP = "get_dataset_wrapper"
_LOAD = "_load_and_process_single_dataset"
_HASH = "generate_dataset_hash_from_config"
_KEYS = ("path", "name", "data_files", "ds_type", "split")


def keep_names(cfg: Any, names: Sequence[str] = (), column: str | None = None) -> None:
    """Lets axolotl's loader put each training row's dataset into the column ``COLUMN``.

    It replaces functions of ``axolotl.utils.data.sft``: those that load and tokenize a dataset, and
    the one that names the folder of prepared rows, so that rows without names are not taken for
    rows with them. With ``column`` the rows of each name are tokenized by themselves, and put back
    in their order where none was dropped.

    Args:
        cfg: axolotl's configuration.
        names: of its datasets, in their order; (): their files or paths.
        column: of the rows with the dataset's name, instead of ``names``.

    Raises:
        InputError: streamed rows, other names than datasets, or datasets that are not told apart.
        MeritFastError: this axolotl has other functions.
    """
    if cfg.get("streaming") or cfg.get("pretraining_dataset") or cfg.get("skip_prepare_dataset"):
        raise InputError("merit_losses: needs rows that axolotl tokenizes before training")
    named = _names_by_key(cfg.get("datasets") or (), names) if column is None else {}
    import axolotl.utils.data.sft as loader

    for name in (_WRAP, _LOAD, _HASH):
        if not hasattr(loader, name):
            raise MeritFastError(f"merit_losses: this axolotl has no {name}; axolotl 0.19 has")
    plain_wrap = _plain(loader, _WRAP)
    plain_load = _plain(loader, _LOAD)
    plain_hash = _plain(loader, _HASH)
    splits: list[str] = []  # of the dataset that is being loaded

    def wrap(*arguments: Any, dataset: Any = None, **more: Any) -> Any:
        if column is None or splits[-1:] != ["train"]:
            return plain_wrap(*arguments, dataset=dataset, **more)
        return _by_name(dataset, column, lambda part: plain_wrap(*arguments, dataset=part, **more))

    def load(*arguments: Any, **more: Any) -> Any:
        config = more["dataset_config"] if "dataset_config" in more else arguments[0]
        split = more.get("split", arguments[3] if len(arguments) > 3 else None)
        splits.append(str(split))
        try:
            rows, prompter = plain_load(*arguments, **more)
        finally:
            splits.pop()
        if split == "train" and column is None:
            rows = rows.add_column(COLUMN, [named[_key(config)]] * len(rows))
        return rows, prompter

    def digest(*arguments: Any, **more: Any) -> str:
        return f"{plain_hash(*arguments, **more)}-merit"

    replaced: dict[str, Any] = {_WRAP: wrap, _LOAD: load, _HASH: digest}
    for name, function in replaced.items():
        function._merit_plain = _plain(loader, name)
        setattr(loader, name, function)


def _plain(loader: Any, name: str) -> Any:
    """A function of the loader, without one of ours that an earlier call put there."""
    function = getattr(loader, name)
    return getattr(function, "_merit_plain", function)


def _by_name(rows: Any, column: str, tokenize: Any) -> tuple[Any, Any]:
    """Tokenizes the rows of each name by themselves; returns them named, and the prompter."""
    from datasets import concatenate_datasets

    if column not in rows.column_names:
        raise InputError(
            f"merit_column: {column}: is no column of the rows; they have "
            f"{', '.join(rows.column_names)}"
        )
    values = [str(value) for value in rows[column]]
    parts: list[Any] = []
    places: list[int] = []
    prompter = None
    for name in sorted(set(values)):
        own = [index for index, value in enumerate(values) if value == name]
        part, prompter = tokenize(rows.select(own))
        parts.append(part.add_column(COLUMN, [name] * len(part)))
        places += own if len(part) == len(own) else [-1]
    joined = concatenate_datasets(parts)
    if len(places) == len(joined) and -1 not in places:
        joined = joined.select(sorted(range(len(places)), key=places.__getitem__))
    return joined, prompter


def without_names(rows: Any) -> Any:
    """Rows without the column, such as those that axolotl has split off for evaluation."""
    if rows is None or COLUMN not in (getattr(rows, "column_names", None) or ()):
        return rows
    return rows.remove_columns([COLUMN])


def _names_by_key(datasets: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    if names and len(names) != len(datasets):
        raise InputError(
            f"merit_datasets: must name the {len(datasets)} datasets with merit_losses, got "
            f"{len(names)} names; leave it out to take the names of their files"
        )
    listed = list(names) or [_own_name(dataset) for dataset in datasets]
    keys = [_key(dataset) for dataset in datasets]
    for values in (listed, keys):
        double = next((value for value in values if values.count(value) > 1), None)
        if double is not None:
            raise InputError(f"merit_losses: datasets: two of them are {double}; merge them")
    return dict(zip(keys, listed, strict=True))


def _own_name(dataset: Mapping[str, Any]) -> str:
    files = dataset.get("data_files")
    first = files[0] if isinstance(files, list) and files else files
    return Path(str(first or dataset.get("path"))).stem


def _key(dataset: Mapping[str, Any]) -> str:
    return json.dumps({key: dataset.get(key) for key in _KEYS}, default=str, sort_keys=True)
