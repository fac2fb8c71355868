"""Names of axolotl's datasets on its tokenized rows, which axolotl itself drops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError, MeritFastError

COLUMN = "merit_dataset"
_LOAD = "_load_and_process_single_dataset"
_HASH = "generate_dataset_hash_from_config"
_KEYS = ("path", "name", "data_files", "ds_type", "split")


def keep_names(cfg: Any, names: Sequence[str] = ()) -> None:
    """Lets axolotl's loader put each training row's dataset into the column ``COLUMN``.

    It replaces two functions of ``axolotl.utils.data.sft``: the one that tokenizes a dataset, and
    the one that names the folder of prepared rows, so that rows without names are not taken for
    rows with them.

    Args:
        cfg: axolotl's configuration.
        names: of its datasets, in their order; (): their files or paths.

    Raises:
        InputError: streamed rows, other names than datasets, or datasets that are not told apart.
        MeritFastError: this axolotl has other functions.
    """
    if cfg.get("streaming") or cfg.get("pretraining_dataset") or cfg.get("skip_prepare_dataset"):
        raise InputError("merit_losses: needs rows that axolotl tokenizes before training")
    named = _names_by_key(cfg.get("datasets") or (), names)
    import axolotl.utils.data.sft as loader

    for name in (_LOAD, _HASH):
        if not hasattr(loader, name):
            raise MeritFastError(f"merit_losses: this axolotl has no {name}; axolotl 0.19 has")
    plain_load = getattr(getattr(loader, _LOAD), "_merit_plain", getattr(loader, _LOAD))
    plain_hash = getattr(getattr(loader, _HASH), "_merit_plain", getattr(loader, _HASH))

    def load(
        dataset_config: Any, cfg: Any, tokenizer: Any, split: str, *rest: Any, **more: Any
    ) -> Any:
        rows, prompter = plain_load(dataset_config, cfg, tokenizer, split, *rest, **more)
        if split == "train":
            rows = rows.add_column(COLUMN, [named[_key(dataset_config)]] * len(rows))
        return rows, prompter

    def digest(*arguments: Any, **more: Any) -> str:
        return f"{plain_hash(*arguments, **more)}-merit"

    load._merit_plain = plain_load  # type: ignore[attr-defined]
    digest._merit_plain = plain_hash  # type: ignore[attr-defined]
    setattr(loader, _LOAD, load)
    setattr(loader, _HASH, digest)


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
